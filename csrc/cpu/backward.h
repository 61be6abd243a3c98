// The backward of every op, once their operands' constants are known.
#pragma once

#include "constants.h"

namespace fusedres::FUSEDRES_ISA {

template <class A>
struct OperandBackward {
  const void* data;  // (N, C, S) T; null: its value is not needed
  Constants<A> constants;
  bool from_batch;  // mean and rstd are functions of data
};

// g = dy * act'(z), gx = k * g. First pass: sums of g, gx * (x - mean), g * (r - mean_r), if any are needed;
//   dbias = sum gx,  dweight = rstd * sum gx * (x - mean),  dk = sum g * X
// second pass: dx = A * gx + B * (x - mean) + D,  dr the same with g;  without batch statistics B = D = 0.
template <class A>
struct Backward {
  Shape shape;
  DType dtype;
  Act act;
  const void* dy;
  const void* y;
  const uint8_t* mask;
  OperandBackward<A> x;
  OperandBackward<A> r;
  Gate gate;
  Gradients gradients;
  const uint8_t* choice = nullptr;  // with a max-pool after the activation
  Pool pool = {};
};

template <class A>
void backward(const Backward<A>& op);

}  // namespace fusedres::FUSEDRES_ISA

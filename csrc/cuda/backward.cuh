// The gradients of both ops, in one launch or two.
#pragma once

#include "launch.cuh"

namespace fusedres::cuda {

template <class A>
struct BackwardOperand {
  const void* data;  // (N, C, S) T, or null where its value is not needed
  const A* mean;     // (C,), or null for 0
  const A* low;      // (C,), the mean's remainder, or null for 0
  const A* rstd;     // (C,), or null for 1
  const A* weight;   // (C,), or null for 1
  const A* bias;     // (C,), or null for none
  bool from_batch;   // mean and rstd are functions of data
  void* gradient;    // (N, C, S) T, or null
  A* dweight;        // (C,), or null
  A* dbias;          // (C,), or null

  bool normalised() const { return mean || rstd || weight || bias; }
};

// g = dy * act'(z), gx = k * g;  dbias = sum gx,  dweight = rstd * sum gx * (x - mean)
//   dx = A * gx + B * (x - mean) + D,  A = weight * rstd,  B = -A * rstd * dweight / M,  D = -A * dbias / M
// dr the same with g;  without batch statistics B = D = 0.
template <class A>
struct Backward {
  Cut cut;  // at first its shape alone
  Act act;
  const void* dy;       // (N, C, S) T
  const void* y;        // (N, C, S) T, or null
  const uint8_t* mask;  // or null
  BackwardOperand<A> x;
  BackwardOperand<A> r;
  Gate gate;
  A* dgate;  // the gate's shape, or null
  Phases phases;
  int resident;  // steps of which the packs stay on chip between the phases
  bool sums_x;   // whether sums over x and r are needed
  bool sums_r;
  bool gate_sums;  // gx = g in them
  int tensor_x;    // where on chip they are kept, or -1; g is tensor 0
  int tensor_r;
  Sums<A>* partials;  // (parts, padded channels)
};

// Reads dy and what tells g, x and r, twice where they are reduced and do not stay on chip; writes dx and dr.
template <class T>
cudaError_t backward(const Backward<Accumulation<T>>& op, const Context& context);

// Of the kernel for channels_last packs, which keeps g and x: what stands for the others.
template <class T>
cudaError_t backward_facts(const Device& device, CudaKernelFacts* facts);

}  // namespace fusedres::cuda

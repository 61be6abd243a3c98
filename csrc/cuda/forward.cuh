// y = act(k * A_x(x) + A_r(r)), the statistics of x and r where they come from the batch, in one launch or
// two.
#pragma once

#include "launch.cuh"

namespace fusedres::cuda {

template <class A>
struct ForwardOperand {
  const void* data;  // (N, C, S) T, or null
  Statistics source;
  const A* mean;    // (C,), or null for 0; if the source is kAbsent
  const A* weight;  // (C,), or null for 1
  const A* bias;    // (C,), or null for none
  A* running_mean;  // (C,), or null
  A* running_var;   // (C,), or null
  A* stats;         // (3, C), or null if the source is kAbsent
  A momentum;
  A eps;

  bool normalised() const { return source != Statistics::kAbsent || mean || weight || bias; }
};

template <class A>
struct Forward {
  Cut cut;  // at first its shape alone
  Act act;
  ForwardOperand<A> x;
  ForwardOperand<A> r;
  Gate gate;
  void* y;        // (N, C, S) T
  uint8_t* mask;  // or null
  Phases phases;
  int resident;          // steps of which the packs stay on chip between the phases
  Centred<A>* partials;  // (2, parts, padded channels): x's and r's
};

// Reads x and r, those with batch statistics once more where they do not stay on chip; writes y and the mask.
template <class T>
cudaError_t forward(const Forward<Accumulation<T>>& op, const Context& context);

// Of the kernel for channels_last packs, which keeps x: what stands for the others.
template <class T>
cudaError_t forward_facts(const Device& device, CudaKernelFacts* facts);

}  // namespace fusedres::cuda

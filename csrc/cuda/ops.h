// The ops on the current device.
#pragma once

#include <cuda_runtime.h>

#include "../params.h"

namespace fusedres::cuda {

// Where and with whose memory the kernels run.
struct Context {
  cudaStream_t stream;
  void* (*allocate)(void* owner, size_t bytes);  // lives until the op's kernels have been queued
  void* owner;
};

cudaError_t affine_act_forward(const AffineActForward& op, const Context& context);
cudaError_t affine_act_backward(const AffineActBackward& op, const Context& context);
cudaError_t bn_act_forward(const BnActForward& op, const Context& context);
cudaError_t bn_act_backward(const BnActBackward& op, const Context& context);

}  // namespace fusedres::cuda

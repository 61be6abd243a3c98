#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <vector>

#include "../cuda/cut.h"
#include "../cuda/ops.h"
#include "kernels.h"

// A torch without CUDA lacks it. The library can be built and loaded there all the same.
#pragma weak aoti_torch_get_current_cuda_stream

namespace fusedres {
namespace {

// Scratch of one call out of torch's allocator: freed at once, it is reused in the order of the stream.
class Scratch {
 public:
  explicit Scratch(const Tensor& like) : like_(like) {}

  static void* allocate(void* owner, size_t bytes) {
    Scratch& scratch = *static_cast<Scratch*>(owner);
    scratch.tensors_.push_back(empty_bytes(scratch.like_, {static_cast<int64_t>(bytes)}));
    return scratch.tensors_.back().data_ptr();
  }

 private:
  const Tensor& like_;
  std::vector<Tensor> tensors_;
};

template <class Op>
void queue(cudaError_t (*kernels)(const Op&, const cuda::Context&), const Op& op, const Tensor& like) {
  STD_TORCH_CHECK(cuda::group_size(op.shape, 1) <= INT32_MAX,
                  "the CUDA kernels take at most 2^31 - 1 values a channel; split the batch");
  const int32_t device = like.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  Scratch scratch(like);
  const cudaError_t error = kernels(op, {static_cast<cudaStream_t>(stream), &Scratch::allocate, &scratch});
  STD_TORCH_CHECK(error == cudaSuccess, "the CUDA kernels can't be launched: ", cudaGetErrorString(error));
}

}  // namespace

void run(const AffineActForward& op, const Tensor& like) { queue(&cuda::affine_act_forward, op, like); }
void run(const AffineActBackward& op, const Tensor& like) { queue(&cuda::affine_act_backward, op, like); }
void run(const BnActForward& op, const Tensor& like) { queue(&cuda::bn_act_forward, op, like); }
void run(const BnActBackward& op, const Tensor& like) { queue(&cuda::bn_act_backward, op, like); }

}  // namespace fusedres

#include <torch/csrc/stable/ops.h>

#include "../cpu/isa.h"
#include "../cpu/parallel.h"
#include "kernels.h"

namespace fusedres {

void parallel_for(int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
  torch::stable::parallel_for(0, count, grain,
                              [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

int64_t thread_count() { return torch::stable::get_num_threads(); }

void run(const AffineActForward& op, const Tensor&) { variant_for(op.dtype).affine_act_forward(op); }
void run(const AffineActBackward& op, const Tensor&) { variant_for(op.dtype).affine_act_backward(op); }
void run(const BnActForward& op, const Tensor&) { variant_for(op.dtype).bn_act_forward(op); }
void run(const BnActBackward& op, const Tensor&) { variant_for(op.dtype).bn_act_backward(op); }

}  // namespace fusedres

// A library's kernels as operators: FUSEDRES_NAMESPACE, FUSEDRES_KEY. Python defines the schemas; see
// fusedres/ops.
//
// An op checks nothing that fusedres.ops.contract and the backend's objections have checked.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>
#include <vector>

#include "kernels.h"
#include "operands.h"

namespace fusedres {
namespace {

using SevenTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

std::tuple<Tensor, Tensor> affine_act_forward(const Tensor& x, const OptionalTensor& scale,
                                              const OptionalTensor& bias, const OptionalTensor& mean,
                                              const OptionalTensor& residual, const OptionalTensor& scale_r,
                                              const OptionalTensor& bias_r, const OptionalTensor& mean_r,
                                              const OptionalTensor& gate, int64_t act, bool keep_mask) {
  const Memory memory = memory_of(x);
  const Tensor y = memory.empty_output(x);
  const Tensor mask = memory.empty_mask(x, keep_mask);
  const AffineTensors affine{scale, bias, mean}, affine_r{scale_r, bias_r, mean_r};
  const DType dtype = dtype_of(x);
  run(AffineActForward{memory.shape(keep_mask), dtype, static_cast<int>(act), affine.operand(x.data_ptr()),
                       affine_r.operand(pointer(residual)), gate_of(gate), y.data_ptr(), mask_pointer(mask)},
      x);
  return {y, mask};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act_forward(
    const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& running_mean, const OptionalTensor& running_var, const OptionalTensor& residual,
    const OptionalTensor& weight_r, const OptionalTensor& bias_r, const OptionalTensor& running_mean_r,
    const OptionalTensor& running_var_r, const OptionalTensor& gate, int64_t statistics, int64_t statistics_r,
    double momentum, double momentum_r, double eps, double eps_r, int64_t act, bool keep_mask) {
  const Memory memory = memory_of(x);
  const Tensor y = memory.empty_output(x);
  const Tensor mask = memory.empty_mask(x, keep_mask);
  const NormTensors norm{weight,
                         bias,
                         running_mean,
                         running_var,
                         empty_statistics(x, statistics),
                         static_cast<Statistics>(statistics),
                         momentum,
                         eps};
  const NormTensors norm_r{weight_r,
                           bias_r,
                           running_mean_r,
                           running_var_r,
                           empty_statistics(x, statistics_r),
                           static_cast<Statistics>(statistics_r),
                           momentum_r,
                           eps_r};
  const DType dtype = dtype_of(x);
  run(BnActForward{memory.shape(keep_mask), dtype, static_cast<int>(act), norm.operand(x.data_ptr()),
                   norm_r.operand(pointer(residual)), gate_of(gate), y.data_ptr(), mask_pointer(mask)},
      x);
  norm.write_back();
  norm_r.write_back();
  return {y, norm.stats, norm_r.stats, mask};
}

// What the backward kernels of both ops share: dy in x's memory order, and the seven results. In place dx and
// dr go where x and the residual are, if these are given: each element is read before it is written.
struct BackwardTensors {
  BackwardTensors(const Tensor& dy, const OptionalTensor& y, const OptionalTensor& mask,
                  const OptionalTensor& x, const OptionalTensor& residual, const OptionalTensor& gate,
                  const std::vector<bool>& needs, bool in_place = false)
      : memory(memory_of_backward(dy, y, mask, x, residual)),
        dense_dy(memory.dense(dy)),
        over_x(in_place && needs[0] ? pointer(x) : nullptr),
        over_residual(in_place && needs[3] ? pointer(residual) : nullptr) {
    const std::vector<int64_t> channels{memory.channels};
    auto wanted = [&](int index, const std::vector<int64_t>& sizes) {
      return empty_accumulation(dy, needs[index] ? sizes : std::vector<int64_t>{0});
    };
    auto like = [&](int index, const OptionalTensor& operand, const void* over) {
      return needs[index] && !over ? memory.empty_output(operand ? *operand : dense_dy) : empty_nothing(dy);
    };
    std::vector<int64_t> gate_sizes{0};
    if (gate) gate_sizes.assign(gate->sizes().begin(), gate->sizes().end());
    results = {
        like(0, x, over_x),  wanted(1, channels), wanted(2, channels),  like(3, residual, over_residual),
        wanted(4, channels), wanted(5, channels), wanted(6, gate_sizes)};
  }

  Gradients gradients() const {
    Gradients to =
        std::apply([](const auto&... result) { return Gradients{result_pointer(result)...}; }, results);
    if (over_x) to.dx = over_x;
    if (over_residual) to.dr = over_residual;
    return to;
  }

  const Memory memory;
  const Tensor dense_dy;
  void* const over_x;
  void* const over_residual;
  SevenTensors results;
};

SevenTensors affine_act_backward(const Tensor& dy, const OptionalTensor& y, const OptionalTensor& mask,
                                 const OptionalTensor& x, const OptionalTensor& scale,
                                 const OptionalTensor& bias, const OptionalTensor& mean,
                                 const OptionalTensor& residual, const OptionalTensor& scale_r,
                                 const OptionalTensor& bias_r, const OptionalTensor& mean_r,
                                 const OptionalTensor& gate, int64_t act, const std::vector<bool>& needs) {
  const BackwardTensors tensors(dy, y, mask, x, residual, gate, needs);
  const AffineTensors affine{scale, bias, mean}, affine_r{scale_r, bias_r, mean_r};
  const DType dtype = dtype_of(dy);
  run(AffineActBackward{tensors.memory.shape(mask.has_value()), dtype, static_cast<int>(act),
                        tensors.dense_dy.data_ptr(), pointer(y), static_cast<const uint8_t*>(pointer(mask)),
                        affine.operand(pointer(x)), affine_r.operand(pointer(residual)), gate_of(gate),
                        tensors.gradients()},
      dy);
  return tensors.results;
}

template <bool kInPlace>
SevenTensors bn_act_backward(const Tensor& dy, const OptionalTensor& y, const OptionalTensor& mask,
                             const OptionalTensor& x, const OptionalTensor& weight,
                             const OptionalTensor& bias, const Tensor& stats, const OptionalTensor& residual,
                             const OptionalTensor& weight_r, const OptionalTensor& bias_r,
                             const Tensor& stats_r, const OptionalTensor& gate, int64_t statistics,
                             int64_t statistics_r, int64_t act, const std::vector<bool>& needs) {
  const BackwardTensors tensors(dy, y, mask, x, residual, gate, needs, kInPlace);
  const NormTensors norm = backward_norm(weight, bias, stats, statistics);
  const NormTensors norm_r = backward_norm(weight_r, bias_r, stats_r, statistics_r);
  const DType dtype = dtype_of(dy);
  run(BnActBackward{tensors.memory.shape(mask.has_value()), dtype, static_cast<int>(act),
                    tensors.dense_dy.data_ptr(), pointer(y), static_cast<const uint8_t*>(pointer(mask)),
                    norm.operand(pointer(x)), norm_r.operand(pointer(residual)), gate_of(gate),
                    tensors.gradients()},
      dy);
  return tensors.results;
}

}  // namespace
}  // namespace fusedres

STABLE_TORCH_LIBRARY_IMPL(FUSEDRES_NAMESPACE, FUSEDRES_KEY, m) {
  m.impl("affine_act_forward", TORCH_BOX(&fusedres::affine_act_forward));
  m.impl("affine_act_backward", TORCH_BOX(&fusedres::affine_act_backward));
  m.impl("bn_act_forward", TORCH_BOX(&fusedres::bn_act_forward));
  m.impl("bn_act_backward", TORCH_BOX(&fusedres::bn_act_backward<false>));
  m.impl("bn_act_backward_", TORCH_BOX(&fusedres::bn_act_backward<true>));
}

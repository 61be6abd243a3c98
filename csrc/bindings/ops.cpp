// The kernels as operators of the namespace fusedres_native. Python defines the schemas; see fusedres/ops.
//
// A CPU op checks nothing that fusedres.ops.contract and the backend's objections have checked.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>
#include <vector>

#include "../cpu/isa.h"
#include "../cpu/parallel.h"
#include "operands.h"

namespace fusedres {

void parallel_for(int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
  torch::stable::parallel_for(0, count, grain,
                              [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

namespace {

using SevenTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// What the backward of a norm is told: no running statistics.
NormTensors backward_norm(const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& stats,
                          int64_t statistics) {
  return {weight, bias, {}, {}, stats, static_cast<Statistics>(statistics), 0, 0};
}

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
  variant_for(dtype).affine_act_forward({memory.shape(keep_mask), dtype, static_cast<int>(act),
                                         affine.operand(x.data_ptr()), affine_r.operand(pointer(residual)),
                                         gate_of(gate), y.data_ptr(), mask_pointer(mask)});
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
  variant_for(dtype).bn_act_forward({memory.shape(keep_mask), dtype, static_cast<int>(act),
                                     norm.operand(x.data_ptr()), norm_r.operand(pointer(residual)),
                                     gate_of(gate), y.data_ptr(), mask_pointer(mask)});
  norm.write_back();
  norm_r.write_back();
  return {y, norm.stats, norm_r.stats, mask};
}

// What the backward kernels of both ops share: dy in x's memory order, and the seven results.
struct BackwardTensors {
  BackwardTensors(const Tensor& dy, const OptionalTensor& y, const OptionalTensor& mask,
                  const OptionalTensor& x, const OptionalTensor& residual, const OptionalTensor& gate,
                  const std::vector<bool>& needs)
      : memory(memory_of_backward(dy, y, mask, x, residual)), dense_dy(memory.dense(dy)) {
    const std::vector<int64_t> channels{memory.channels};
    auto wanted = [&](int index, const std::vector<int64_t>& sizes) {
      return empty_accumulation(dy, needs[index] ? sizes : std::vector<int64_t>{0});
    };
    auto like = [&](int index, const OptionalTensor& operand) {
      return needs[index] ? memory.empty_output(operand ? *operand : dense_dy) : empty_nothing(dy);
    };
    std::vector<int64_t> gate_sizes{0};
    if (gate) gate_sizes.assign(gate->sizes().begin(), gate->sizes().end());
    results = {like(0, x),          wanted(1, channels), wanted(2, channels),  like(3, residual),
               wanted(4, channels), wanted(5, channels), wanted(6, gate_sizes)};
  }

  Gradients gradients() const {
    return std::apply([](const auto&... result) { return Gradients{result_pointer(result)...}; }, results);
  }

  const Memory memory;
  const Tensor dense_dy;
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
  variant_for(dtype).affine_act_backward(
      {tensors.memory.shape(mask.has_value()), dtype, static_cast<int>(act), tensors.dense_dy.data_ptr(),
       pointer(y), static_cast<const uint8_t*>(pointer(mask)), affine.operand(pointer(x)),
       affine_r.operand(pointer(residual)), gate_of(gate), tensors.gradients()});
  return tensors.results;
}

SevenTensors bn_act_backward(const Tensor& dy, const OptionalTensor& y, const OptionalTensor& mask,
                             const OptionalTensor& x, const OptionalTensor& weight,
                             const OptionalTensor& bias, const Tensor& stats, const OptionalTensor& residual,
                             const OptionalTensor& weight_r, const OptionalTensor& bias_r,
                             const Tensor& stats_r, const OptionalTensor& gate, int64_t statistics,
                             int64_t statistics_r, int64_t act, const std::vector<bool>& needs) {
  const BackwardTensors tensors(dy, y, mask, x, residual, gate, needs);
  const NormTensors norm = backward_norm(weight, bias, stats, statistics);
  const NormTensors norm_r = backward_norm(weight_r, bias_r, stats_r, statistics_r);
  const DType dtype = dtype_of(dy);
  variant_for(dtype).bn_act_backward({tensors.memory.shape(mask.has_value()), dtype, static_cast<int>(act),
                                      tensors.dense_dy.data_ptr(), pointer(y),
                                      static_cast<const uint8_t*>(pointer(mask)), norm.operand(pointer(x)),
                                      norm_r.operand(pointer(residual)), gate_of(gate), tensors.gradients()});
  return tensors.results;
}

Pool pool_of(const Tensor& x, const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
             const std::vector<int64_t>& padding) {
  auto axis = [&](int index) {
    const int64_t size = x.size(2 + index), k = kernel[index], s = stride[index], p = padding[index];
    return PoolAxis{size, (size + 2 * p - k) / s + 1, k, s, p};
  };
  return {axis(0), axis(1)};
}

std::tuple<Tensor, Tensor, Tensor> bn_act_pool_forward(
    const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& running_mean, const OptionalTensor& running_var, int64_t statistics,
    double momentum, double eps, const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
    const std::vector<int64_t>& padding, int64_t act, bool keep_choice) {
  const Memory memory = memory_of(x);
  const Pool pool = pool_of(x, kernel, stride, padding);
  const Memory pooled = memory.pooled(pool.rows.outputs, pool.columns.outputs);
  const Tensor y = pooled.empty_output(x);
  const Tensor choice = pooled.empty_bytes(x, keep_choice);
  const NormTensors norm{weight,
                         bias,
                         running_mean,
                         running_var,
                         empty_statistics(x, statistics),
                         static_cast<Statistics>(statistics),
                         momentum,
                         eps};
  const DType dtype = dtype_of(x);
  variant_for(dtype).bn_act_pool_forward({memory.shape(memory.order()), dtype, static_cast<int>(act),
                                          norm.operand(x.data_ptr()), pool, y.data_ptr(),
                                          mask_pointer(choice)});
  norm.write_back();
  return {y, norm.stats, choice};
}

std::tuple<Tensor, Tensor, Tensor> bn_act_pool_backward(
    const Tensor& dy, const Tensor& choice, const Tensor& x, const OptionalTensor& weight,
    const Tensor& stats, int64_t statistics, const std::vector<int64_t>& kernel,
    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding, const std::vector<bool>& needs) {
  const Memory memory = memory_of(x);
  const Pool pool = pool_of(x, kernel, stride, padding);
  const Tensor dense_dy = memory.pooled(pool.rows.outputs, pool.columns.outputs).dense(dy);
  auto per_channel = [&](bool needed) { return empty_accumulation(x, {needed ? memory.channels : 0}); };
  const Tensor dx = needs[0] ? memory.empty_output(x) : empty_nothing(x);
  const Tensor dweight = per_channel(needs[1]), dbias = per_channel(needs[2]);
  const NormTensors norm = backward_norm(weight, {}, stats, statistics);
  const DType dtype = dtype_of(x);
  variant_for(dtype).bn_act_pool_backward({memory.shape(memory.order()),
                                           dtype,
                                           dense_dy.data_ptr(),
                                           static_cast<const uint8_t*>(choice.data_ptr()),
                                           norm.operand(x.data_ptr()),
                                           pool,
                                           {result_pointer(dx), result_pointer(dweight),
                                            result_pointer(dbias), nullptr, nullptr, nullptr, nullptr}});
  return {dx, dweight, dbias};
}

}  // namespace
}  // namespace fusedres

STABLE_TORCH_LIBRARY_IMPL(fusedres_native, CPU, m) {
  m.impl("affine_act_forward", TORCH_BOX(&fusedres::affine_act_forward));
  m.impl("affine_act_backward", TORCH_BOX(&fusedres::affine_act_backward));
  m.impl("bn_act_forward", TORCH_BOX(&fusedres::bn_act_forward));
  m.impl("bn_act_backward", TORCH_BOX(&fusedres::bn_act_backward));
  m.impl("bn_act_pool_forward", TORCH_BOX(&fusedres::bn_act_pool_forward));
  m.impl("bn_act_pool_backward", TORCH_BOX(&fusedres::bn_act_pool_backward));
}

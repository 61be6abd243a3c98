// bn_act_pool as an operator of the CPU library, which alone has kernels for it.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>
#include <vector>

#include "../cpu/isa.h"
#include "operands.h"

namespace fusedres {
namespace {

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
  m.impl("bn_act_pool_forward", TORCH_BOX(&fusedres::bn_act_pool_forward));
  m.impl("bn_act_pool_backward", TORCH_BOX(&fusedres::bn_act_pool_backward));
}

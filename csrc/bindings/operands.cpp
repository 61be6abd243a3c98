#include "operands.h"

namespace fusedres {
namespace {

// Whether the kernels can't read it where it is.
bool needs_copy(const Tensor& t) {
  const DType dtype = dtype_of(t);
  return dtype == DType::kBFloat16 || dtype == DType::kFloat16 || (t.size(0) > 1 && t.stride(0) != 1);
}

OptionalTensor widened(const OptionalTensor& t) {
  if (!t || !needs_copy(*t)) return t;
  Tensor wide = empty_accumulation(*t, {t->size(0)});
  return torch::stable::copy_(wide, *t);
}

}  // namespace

Gate gate_of(const OptionalTensor& gate) {
  if (!gate) return {};
  auto stride = [&](int64_t dim) { return gate->size(dim) == 1 ? 0 : gate->stride(dim); };
  return {gate->data_ptr(), dtype_of(*gate), stride(0), stride(1)};
}

PerChannel::PerChannel(const OptionalTensor& t) : given_(t), wide_(widened(t)) {}

void PerChannel::write_back() const {
  if (!given_ || !needs_copy(*given_)) return;
  Tensor given = *given_;
  torch::stable::copy_(given, *wide_);
}

void NormTensors::write_back() const {
  if (source != Statistics::kBatch) return;
  running_mean.write_back();
  running_var.write_back();
}

NormTensors backward_norm(const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& stats,
                          int64_t statistics) {
  return {weight, bias, {}, {}, stats, static_cast<Statistics>(statistics), 0, 0};
}

}  // namespace fusedres

// The end of a network as operators of the CPU library.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "../cpu/isa.h"
#include "operands.h"
#include "recording.h"

namespace fusedres {
namespace {

bool is_row(const Tensor& t, int64_t size) {
  return dtype_of(t) == DType::kFloat32 && t.dim() == 1 && t.size(0) == size && t.is_contiguous();
}

void mean_out(const Tensor& x, const Tensor& y) {
  const DType dtype = dtype_of(x), y_dtype = dtype_of(y);
  STD_TORCH_CHECK(dtype == DType::kFloat32 || dtype == DType::kBFloat16,
                  "mean: x must be float32 or bfloat16");
  STD_TORCH_CHECK(y_dtype == dtype || y_dtype == DType::kFloat32, "mean: y must have x's dtype or float32");
  STD_TORCH_CHECK(is_channels_last(x), "mean: x must be in channels_last");
  STD_TORCH_CHECK(y.numel() == x.size(0) * x.size(1) && y.is_contiguous() && x.size(2) * x.size(3) > 0,
                  "mean: y must have a value for every channel of every image");
  run(Mean{x.size(0), x.size(2) * x.size(3), x.size(1), dtype, y_dtype, x.data_ptr(), y.data_ptr()});
}

void connect_out(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& y) {
  STD_TORCH_CHECK(x.dim() == 2 && dtype_of(x) == DType::kFloat32 && x.is_contiguous(),
                  "connect: x must be (images, inputs) in float32 and contiguous");
  STD_TORCH_CHECK(weight.dim() == 2 && dtype_of(weight) == DType::kBFloat16 && weight.is_contiguous() &&
                      weight.size(1) == x.size(1),
                  "connect: the weight must be (outputs, inputs) in bfloat16 and contiguous");
  STD_TORCH_CHECK(!bias || is_row(*bias, weight.size(0)), "connect: the bias must be (outputs,) in float32");
  STD_TORCH_CHECK(y.dim() == 2 && dtype_of(y) == DType::kBFloat16 && y.is_contiguous() &&
                      y.size(0) == x.size(0) && y.size(1) == weight.size(0),
                  "connect: y must be (images, outputs) in bfloat16 and contiguous");
  if (y.numel() == 0) return;
  variant_for(DType::kBFloat16)
      .connect({x.size(0), x.size(1), weight.size(0), static_cast<const float*>(x.data_ptr()),
                weight.data_ptr(), bias ? static_cast<const float*>(bias->data_ptr()) : nullptr,
                y.data_ptr()});
}

}  // namespace
}  // namespace fusedres

STABLE_TORCH_LIBRARY_IMPL(fusedres_native, CPU, m) {
  m.impl("mean_out", TORCH_BOX(&fusedres::mean_out));
  m.impl("connect_out", TORCH_BOX(&fusedres::connect_out));
}

// conv_act as operators of the CPU library, which alone has kernels for it: FUSEDRES_NAMESPACE.
//
// Weights travel packed, as a tensor of bytes (outputs, inputs, rows, columns, n): its shape tells the
// window, its values are laid out as csrc/cpu/conv_weights.h says, and n is whatever they need.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "../cpu/conv_weights.h"
#include "operands.h"
#include "recording.h"

namespace fusedres {
namespace {

ConvWeights shape_of(DType dtype, const Tensor& weight, int64_t groups, int64_t tile) {
  return ConvWeights::of(dtype, groups, weight.size(1), weight.size(0) / groups, weight.size(2),
                         weight.size(3), tile);
}

// The tile that weights were packed for: a larger one takes more room.
int64_t tile_of(DType dtype, const Tensor& packed, int64_t groups) {
  STD_TORCH_CHECK(packed.dim() == 5, "conv_act: the weight must come from conv_act_pack");
  for (int64_t tile : {1, 2, 4, 7})
    if (shape_of(dtype, packed, groups, tile).room() == packed.size(4)) return tile;
  STD_TORCH_CHECK(false, "conv_act: the weight was packed for other groups or another dtype");
}

DType conv_dtype(const Tensor& t, const char* name) {
  const DType dtype = dtype_of(t);
  STD_TORCH_CHECK(dtype == DType::kFloat32 || dtype == DType::kBFloat16, "conv_act: ", name,
                  " must be float32 or bfloat16; convert it");
  return dtype;
}

Tensor conv_act_pack(const Tensor& weight, int64_t groups, int64_t tile) {
  const ConvWeights shape = shape_of(conv_dtype(weight, "the weight"), weight, groups, tile);
  const Tensor packed =
      empty_bytes(weight, {weight.size(0), weight.size(1), weight.size(2), weight.size(3), shape.room()});
  const int64_t strides[] = {weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)};
  conv_pack(shape, weight.data_ptr(), strides, packed.data_ptr(), packed.numel());
  return packed;
}

struct Windows {
  const std::vector<int64_t>&stride, &padding, &dilation;

  ConvAxis axis(const Tensor& x, const Tensor& packed, int index) const {
    const int64_t size = x.size(2 + index), kernel = packed.size(2 + index);
    const int64_t s = stride[index], p = padding[index], d = dilation[index];
    return {size, (size + 2 * p - d * (kernel - 1) - 1) / s + 1, kernel, s, p, d};
  }
};

void require_channels_last(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(is_channels_last(t), "conv_act: ", name, " must be in channels_last; convert it");
}

// A value for each of y's channels; null where there are none.
const float* channels_of(const OptionalTensor& t, const Tensor& packed, const char* name) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(dtype_of(*t) == DType::kFloat32, "conv_act: ", name, " must be float32; convert it");
  STD_TORCH_CHECK(t->numel() == packed.size(0) && t->is_contiguous(), "conv_act: ", name, " must be ",
                  packed.size(0), " values side by side");
  return static_cast<const float*>(t->data_ptr());
}

void run_conv_act(const Tensor& x, const Tensor& packed, const OptionalTensor& bias,
                  const OptionalTensor& scale, const Tensor* residual, const Tensor& y,
                  const Windows& windows, int64_t groups, int64_t act) {
  const DType dtype = conv_dtype(x, "x");
  require_channels_last(x, "x");
  if (residual) {
    require_channels_last(*residual, "the residual");
    STD_TORCH_CHECK(dtype_of(*residual) == dtype, "conv_act: the residual must be of x's dtype; convert it");
  }
  STD_TORCH_CHECK(x.size(1) == groups * packed.size(1), "conv_act: x has ", x.size(1),
                  " channels, and the weight is for ", groups * packed.size(1));
  const int64_t tile = tile_of(dtype, packed, groups);
  run(ConvAct{x.size(0), x.size(1), packed.size(0), groups, tile, windows.axis(x, packed, 0),
              windows.axis(x, packed, 1), dtype, static_cast<int>(act), x.data_ptr(), packed.data_ptr(),
              channels_of(bias, packed, "the bias"), residual ? residual->data_ptr() : nullptr, y.data_ptr(),
              channels_of(scale, packed, "the scale")});
}

Tensor conv_act(const Tensor& x, const Tensor& packed, const OptionalTensor& bias,
                const OptionalTensor& scale, const OptionalTensor& residual,
                const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                const std::vector<int64_t>& dilation, int64_t groups, int64_t act) {
  const Windows windows{stride, padding, dilation};
  const Tensor y = empty_channels_last(
      x, {x.size(0), packed.size(0), windows.axis(x, packed, 0).outputs, windows.axis(x, packed, 1).outputs});
  run_conv_act(x, packed, bias, scale, residual ? &*residual : nullptr, y, windows, groups, act);
  return y;
}

void conv_act_(const Tensor& x, const Tensor& packed, const OptionalTensor& bias, const OptionalTensor& scale,
               const Tensor& residual, const std::vector<int64_t>& stride,
               const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups,
               int64_t act) {
  run_conv_act(x, packed, bias, scale, &residual, residual, {stride, padding, dilation}, groups, act);
}

void conv_act_out(const Tensor& x, const Tensor& packed, const OptionalTensor& bias,
                  const OptionalTensor& scale, const OptionalTensor& residual,
                  const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                  const std::vector<int64_t>& dilation, int64_t groups, int64_t act, const Tensor& y) {
  const Windows windows{stride, padding, dilation};
  require_channels_last(y, "y");
  STD_TORCH_CHECK(dtype_of(y) == dtype_of(x) && y.size(0) == x.size(0) && y.size(1) == packed.size(0) &&
                      y.size(2) == windows.axis(x, packed, 0).outputs &&
                      y.size(3) == windows.axis(x, packed, 1).outputs,
                  "conv_act: y must have the sizes and the dtype of the result");
  run_conv_act(x, packed, bias, scale, residual ? &*residual : nullptr, y, windows, groups, act);
}

}  // namespace
}  // namespace fusedres

STABLE_TORCH_LIBRARY_IMPL(FUSEDRES_NAMESPACE, CPU, m) {
  m.impl("conv_act_pack", TORCH_BOX(&fusedres::conv_act_pack));
  m.impl("conv_act", TORCH_BOX(&fusedres::conv_act));
  m.impl("conv_act_", TORCH_BOX(&fusedres::conv_act_));
  m.impl("conv_act_out", TORCH_BOX(&fusedres::conv_act_out));
}

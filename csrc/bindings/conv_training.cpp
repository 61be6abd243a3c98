// The convolutions of a training step, all but the gradients of their weights, as operators of the CPU
// library.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <utility>
#include <vector>

#include "../cpu/conv_weights.h"
#include "../cpu/isa.h"
#include "../cpu/parallel.h"
#include "operands.h"

namespace fusedres {
namespace {

float* floats(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }

// A weight as a convolution reads it; `transposed`: the one that takes dy to dx.
struct Weight {
  int64_t outputs, inputs;
  int64_t kernel[2];
  PlainWeight plain;

  Weight(const Tensor& weight, bool transposed)
      : outputs(weight.size(0)),
        inputs(weight.size(1)),
        kernel{weight.size(2), weight.size(3)},
        plain{weight.data_ptr(),
              dtype_of(weight),
              {weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)}} {
    if (!transposed) return;
    int64_t (&strides)[4] = plain.strides;
    const int64_t last = (kernel[0] - 1) * strides[2] + (kernel[1] - 1) * strides[3];
    plain.begin = static_cast<const char*>(plain.begin) + last * size_of(plain.dtype);
    std::swap(outputs, inputs);
    std::swap(strides[0], strides[1]);
    strides[2] = -strides[2];
    strides[3] = -strides[3];
  }
};

struct Windows {
  const std::vector<int64_t>&stride, &padding, &dilation;

  ConvAxis axis(const Tensor& x, const Weight& weight, int index) const {
    const int64_t size = x.size(2 + index), kernel = weight.kernel[index];
    const int64_t s = stride[index], p = padding[index], d = dilation[index];
    return {size, (size + 2 * p - d * (kernel - 1) - 1) / s + 1, kernel, s, p, d};
  }
};

bool has_form(DType dtype, const Weight& weight, const Windows& windows, int64_t tile) {
  if (tile == 1) return true;
  const std::vector<int64_t> one{1, 1};
  return (tile == 2 || tile == 4 || (tile == 7 && dtype == DType::kBFloat16)) && weight.kernel[0] == 3 &&
         weight.kernel[1] == 3 && windows.stride == one && windows.dilation == one;
}

// Of a weight that is packed in Winograd's form.
constexpr int64_t kMostPacked = int64_t{4} << 20;

// The weight is packed in scratch that is kept; in Winograd's form, where that is large, block by block as it
// is used.
void convolve(const Tensor& x, const Weight& weight, const OptionalTensor& bias, const Tensor* residual,
              const Tensor& y, const Windows& windows, int64_t tile) {
  const DType dtype = dtype_of(x);
  const auto& [outputs, inputs, kernel, plain] = weight;
  ConvAct op{x.size(0),
             inputs,
             outputs,
             1,
             tile,
             windows.axis(x, weight, 0),
             windows.axis(x, weight, 1),
             dtype,
             0,
             x.data_ptr(),
             nullptr,
             bias ? floats(*bias) : nullptr,
             residual ? residual->data_ptr() : nullptr,
             y.data_ptr(),
             nullptr,
             plain};
  Arena arena;
  const ConvWeights shape{dtype, 1, inputs, outputs, kernel[0], kernel[1], tile};
  const int64_t bytes = shape.elements() * size_of(dtype);
  if (tile == 1 || bytes <= kMostPacked) {
    void* const packed = arena.take<char>(bytes);
    variant_for(DType::kFloat32)
        .conv_repack({inputs, outputs, kernel[0], kernel[1], tile, dtype, plain, packed});
    op.weights = packed;
  }
  variant_for(dtype).conv_act(op);
}

Weight weight_for(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Windows& windows,
                  int64_t tile, bool transposed) {
  const DType dtype = dtype_of(x);
  STD_TORCH_CHECK(dtype == DType::kFloat32 || dtype == DType::kBFloat16,
                  "conv: x must be float32 or bfloat16; convert it");
  STD_TORCH_CHECK(is_channels_last(x), "conv: x must be in channels_last; convert it");
  STD_TORCH_CHECK(weight.dim() == 4 && (dtype_of(weight) == dtype || dtype_of(weight) == DType::kFloat32),
                  "conv: the weight must be float32 or have x's dtype, and four dimensions");
  STD_TORCH_CHECK(!bias || dtype_of(*bias) == DType::kFloat32, "conv: the bias must be float32; convert it");
  const Weight found(weight, transposed);
  STD_TORCH_CHECK(x.size(1) == found.inputs, "conv: x has ", x.size(1), " channels, and the weight is for ",
                  found.inputs);
  STD_TORCH_CHECK(has_form(dtype, found, windows, tile), "conv: these windows have no tile of ", tile);
  return found;
}

void require_residual(const Tensor& x, const Tensor& residual) {
  STD_TORCH_CHECK(dtype_of(residual) == dtype_of(x) && is_channels_last(residual),
                  "conv: the residual must be in channels_last and have x's dtype; convert it");
}

Tensor conv(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
            const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
            const std::vector<int64_t>& dilation, int64_t tile, bool transposed) {
  const Windows windows{stride, padding, dilation};
  const Weight found = weight_for(x, weight, bias, windows, tile, transposed);
  if (residual) require_residual(x, *residual);
  const Tensor y = empty_channels_last(
      x, {x.size(0), found.outputs, windows.axis(x, found, 0).outputs, windows.axis(x, found, 1).outputs});
  convolve(x, found, bias, residual ? &*residual : nullptr, y, windows, tile);
  return y;
}

void conv_(const Tensor& x, const Tensor& weight, const Tensor& residual, const std::vector<int64_t>& stride,
           const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t tile,
           bool transposed) {
  const Windows windows{stride, padding, dilation};
  const Weight found = weight_for(x, weight, std::nullopt, windows, tile, transposed);
  require_residual(x, residual);
  convolve(x, found, std::nullopt, &residual, residual, windows, tile);
}

}  // namespace
}  // namespace fusedres

STABLE_TORCH_LIBRARY_IMPL(FUSEDRES_NAMESPACE, CPU, m) {
  m.impl("conv", TORCH_BOX(&fusedres::conv));
  m.impl("conv_", TORCH_BOX(&fusedres::conv_));
}

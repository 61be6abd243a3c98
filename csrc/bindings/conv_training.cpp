// The 3x3 convolutions of a training step, of stride 1, as operators of the CPU library.
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

constexpr int64_t kKernel = 3;

float* floats(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }

void require_channels_last(const Tensor& t, const char* op) {
  STD_TORCH_CHECK(dtype_of(t) == DType::kFloat32 && is_channels_last(t), op,
                  ": its tensors must be float32 in channels_last; convert them");
}

void require_tile(int64_t tile, const char* op) {
  STD_TORCH_CHECK(tile == 2 || tile == 4, op, ": the tile must be 2 or 4; got ", tile);
}

int64_t outputs_of(int64_t size, int64_t padding) { return size + 2 * padding - (kKernel - 1); }

ConvAxis axis(const Tensor& x, const std::vector<int64_t>& padding, int index) {
  const int64_t size = x.size(2 + index);
  return {size, outputs_of(size, padding[index]), kKernel, 1, padding[index], 1};
}

// A weight as a convolution reads it; `transposed`: the one that takes dy to dx.
struct Weight {
  int64_t outputs, inputs;
  const float* begin;
  int64_t strides[4];

  Weight(const Tensor& weight, bool transposed)
      : outputs(weight.size(0)),
        inputs(weight.size(1)),
        begin(floats(weight)),
        strides{weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)} {
    if (!transposed) return;
    std::swap(outputs, inputs);
    std::swap(strides[0], strides[1]);
    begin += (kKernel - 1) * (strides[2] + strides[3]);
    strides[2] = -strides[2];
    strides[3] = -strides[3];
  }
};

Weight weight_for(const Tensor& x, const Tensor& weight, bool transposed, int64_t tile) {
  require_channels_last(x, "conv_winograd");
  require_tile(tile, "conv_winograd");
  STD_TORCH_CHECK(dtype_of(weight) == DType::kFloat32 && weight.dim() == 4 && weight.size(2) == kKernel &&
                      weight.size(3) == kKernel,
                  "conv_winograd: the weight must be float32, (outputs, inputs, 3, 3)");
  const Weight found(weight, transposed);
  STD_TORCH_CHECK(x.size(1) == found.inputs, "conv_winograd: x has ", x.size(1),
                  " channels, and the weight is for ", found.inputs);
  return found;
}

// The packed weight is as large as many a tensor of the step: in scratch that is kept.
void convolve(const Tensor& x, const Weight& weight, const OptionalTensor& bias, const Tensor* residual,
              const Tensor& y, const std::vector<int64_t>& padding, int64_t tile) {
  const auto& [outputs, inputs, begin, strides] = weight;
  Arena arena;
  float* const packed =
      arena.take<float>(ConvWeights{DType::kFloat32, 1, inputs, outputs, kKernel, kKernel, tile}.elements());
  const Variant& variant = variant_for(DType::kFloat32);
  variant.conv_repack({inputs, outputs, kKernel, kKernel, tile, begin, strides, packed});
  variant.conv_act({x.size(0), inputs, outputs, 1, tile, axis(x, padding, 0), axis(x, padding, 1),
                    DType::kFloat32, 0, floats(x), packed, bias ? floats(*bias) : nullptr,
                    residual ? floats(*residual) : nullptr, floats(y)});
}

Tensor conv_winograd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                     const OptionalTensor& residual, const std::vector<int64_t>& padding, int64_t tile,
                     bool transposed) {
  const Weight found = weight_for(x, weight, transposed, tile);
  if (residual) require_channels_last(*residual, "conv_winograd");
  const Tensor y = empty_channels_last(
      x, {x.size(0), found.outputs, axis(x, padding, 0).outputs, axis(x, padding, 1).outputs});
  convolve(x, found, bias, residual ? &*residual : nullptr, y, padding, tile);
  return y;
}

void conv_winograd_(const Tensor& x, const Tensor& weight, const Tensor& residual,
                    const std::vector<int64_t>& padding, int64_t tile, bool transposed) {
  const Weight found = weight_for(x, weight, transposed, tile);
  require_channels_last(residual, "conv_winograd_");
  convolve(x, found, std::nullopt, &residual, residual, padding, tile);
}

// Or an empty tensor where it isn't finite.
Tensor conv_dweight(const Tensor& dy, const Tensor& x, const std::vector<int64_t>& padding, int64_t tile) {
  for (const Tensor* t : {&dy, &x}) require_channels_last(*t, "conv_dweight");
  require_tile(tile, "conv_dweight");
  const ConvAxis rows = axis(x, padding, 0), columns = axis(x, padding, 1);
  STD_TORCH_CHECK(dy.size(0) == x.size(0) && dy.size(2) == rows.outputs && dy.size(3) == columns.outputs,
                  "conv_dweight: dy doesn't belong to a 3x3 convolution of x");
  const Tensor dweight = empty_channels_last(x, {dy.size(1), x.size(1), kKernel, kKernel});
  const bool finite = variant_for(DType::kFloat32)
                          .conv_dweight({x.size(0), x.size(1), dy.size(1), tile, rows, columns, floats(x),
                                         floats(dy), floats(dweight)});
  return finite ? dweight : empty_nothing(x);
}

}  // namespace
}  // namespace fusedres

STABLE_TORCH_LIBRARY_IMPL(fusedres_native, CPU, m) {
  m.impl("conv_winograd", TORCH_BOX(&fusedres::conv_winograd));
  m.impl("conv_winograd_", TORCH_BOX(&fusedres::conv_winograd_));
  m.impl("conv_dweight", TORCH_BOX(&fusedres::conv_dweight));
}

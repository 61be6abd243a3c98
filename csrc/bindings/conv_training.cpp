// The convolutions of a training step, all but the gradients of their weights, as operators of the CPU
// library.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <numeric>
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

// Of dx's pixels at first, first + stride, ... along an axis: the taps that see them, each `between` after
// the one before, and the convolution of dy with these.
struct Phase {
  int64_t tap = 0, between;
  ConvAxis axis;

  Phase(const ConvAxis& of_x, int64_t first) : between(of_x.stride / std::gcd(of_x.stride, of_x.dilation)) {
    const auto& [size, outputs, kernel, stride, padding, dilation] = of_x;
    while (tap < kernel && (first + padding - tap * dilation) % stride) ++tap;
    const int64_t taps = (kernel - tap + between - 1) / between, apart = between * dilation / stride;
    const int64_t begin = (first + padding - tap * dilation) / stride;
    axis = {outputs, (size - first + stride - 1) / stride, taps, 1, (taps - 1) * apart - begin, apart};
  }
};

// A weight as a convolution reads it.
struct Weight {
  int64_t outputs, inputs;
  int64_t kernel[2];
  PlainWeight plain;

  explicit Weight(const Tensor& weight)
      : outputs(weight.size(0)),
        inputs(weight.size(1)),
        kernel{weight.size(2), weight.size(3)},
        plain{weight.data_ptr(),
              dtype_of(weight),
              {weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)}} {}

  Weight taps_of(const Phase& rows, const Phase& columns) const {
    Weight some = *this;
    int64_t (&strides)[4] = some.plain.strides;
    some.move(rows.tap * strides[2] + columns.tap * strides[3]);
    some.kernel[0] = rows.axis.kernel;
    some.kernel[1] = columns.axis.kernel;
    strides[2] *= rows.between;
    strides[3] *= columns.between;
    return some;
  }

  // The one that takes dy to dx.
  Weight transposed() const {
    Weight turned = *this;
    int64_t (&strides)[4] = turned.plain.strides;
    turned.move((kernel[0] - 1) * strides[2] + (kernel[1] - 1) * strides[3]);
    std::swap(turned.outputs, turned.inputs);
    std::swap(strides[0], strides[1]);
    strides[2] = -strides[2];
    strides[3] = -strides[3];
    return turned;
  }

 private:
  void move(int64_t elements) {
    plain.begin = static_cast<const char*>(plain.begin) + elements * size_of(plain.dtype);
  }
};

struct Windows {
  const std::vector<int64_t>&stride, &padding, &dilation;

  ConvAxis axis(int64_t size, const Weight& weight, int index) const {
    const int64_t kernel = weight.kernel[index];
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

// The axes of a convolution, and where its result lies.
struct Placed {
  ConvAxis rows, columns;
  const void* residual;  // or null
  void* y;
  ConvSpread spread = {};
};

// The weight is packed in scratch that is kept; in Winograd's form, where that is large, block by block as it
// is used.
void convolve(const Tensor& x, const Weight& weight, const OptionalTensor& bias, const Placed& at,
              int64_t tile) {
  const DType dtype = dtype_of(x);
  const auto& [outputs, inputs, kernel, plain] = weight;
  ConvAct op{x.size(0),   inputs,       outputs,    1,
             tile,        at.rows,      at.columns, dtype,
             0,           x.data_ptr(), nullptr,    bias ? floats(*bias) : nullptr,
             at.residual, at.y,         nullptr,    plain,
             at.spread};
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

Weight weight_for(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, bool transposed) {
  const DType dtype = dtype_of(x);
  STD_TORCH_CHECK(dtype == DType::kFloat32 || dtype == DType::kBFloat16,
                  "conv: x must be float32 or bfloat16; convert it");
  STD_TORCH_CHECK(is_channels_last(x), "conv: x must be in channels_last; convert it");
  STD_TORCH_CHECK(weight.dim() == 4 && (dtype_of(weight) == dtype || dtype_of(weight) == DType::kFloat32),
                  "conv: the weight must be float32 or have x's dtype, and four dimensions");
  STD_TORCH_CHECK(!bias || dtype_of(*bias) == DType::kFloat32, "conv: the bias must be float32; convert it");
  const Weight plain(weight), found = transposed ? plain.transposed() : plain;
  STD_TORCH_CHECK(x.size(1) == found.inputs, "conv: x has ", x.size(1), " channels, and the weight is for ",
                  found.inputs);
  return found;
}

void require_form(const Tensor& x, const Weight& weight, const Windows& windows, int64_t tile) {
  STD_TORCH_CHECK(has_form(dtype_of(x), weight, windows, tile), "conv: these windows have no tile of ", tile);
}

void require_residual(const Tensor& x, const Tensor& residual, int64_t channels, int64_t height,
                      int64_t width) {
  STD_TORCH_CHECK(dtype_of(residual) == dtype_of(x) && is_channels_last(residual),
                  "conv: the residual must be in channels_last and have x's dtype; convert it");
  STD_TORCH_CHECK(residual.size(0) == x.size(0) && residual.size(1) == channels &&
                      residual.size(2) == height && residual.size(3) == width,
                  "conv: the residual must have the result's sizes");
}

Tensor conv(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
            const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
            const std::vector<int64_t>& dilation, int64_t tile, bool transposed) {
  const Windows windows{stride, padding, dilation};
  const Weight found = weight_for(x, weight, bias, transposed);
  require_form(x, found, windows, tile);
  const ConvAxis rows = windows.axis(x.size(2), found, 0), columns = windows.axis(x.size(3), found, 1);
  if (residual) require_residual(x, *residual, found.outputs, rows.outputs, columns.outputs);
  const Tensor y = empty_channels_last(x, {x.size(0), found.outputs, rows.outputs, columns.outputs});
  convolve(x, found, bias, {rows, columns, residual ? residual->data_ptr() : nullptr, y.data_ptr()}, tile);
  return y;
}

void conv_(const Tensor& x, const Tensor& weight, const Tensor& residual, const std::vector<int64_t>& stride,
           const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t tile,
           bool transposed) {
  const Windows windows{stride, padding, dilation};
  const Weight found = weight_for(x, weight, std::nullopt, transposed);
  require_form(x, found, windows, tile);
  const ConvAxis rows = windows.axis(x.size(2), found, 0), columns = windows.axis(x.size(3), found, 1);
  require_residual(x, residual, found.outputs, rows.outputs, columns.outputs);
  convolve(x, found, std::nullopt, {rows, columns, residual.data_ptr(), residual.data_ptr()}, tile);
}

// dx = the gradient of x + residual. The pixels of dx that lie at one place between two steps of the windows
// see the same taps: theirs is a convolution of dy with these.
void phases(const Tensor& dy, const Tensor& weight, const OptionalTensor& residual, const Tensor& dx,
            const Windows& windows) {
  const Weight found(weight);
  const int64_t height = dx.size(2), width = dx.size(3), pixel = dx.size(1) * size_of(dtype_of(dx));
  const ConvAxis rows = windows.axis(height, found, 0), columns = windows.axis(width, found, 1);
  STD_TORCH_CHECK(rows.outputs == dy.size(2) && columns.outputs == dy.size(3), "conv_dx: these windows make ",
                  rows.outputs, " x ", columns.outputs, " pixels of dx's, and dy has ", dy.size(2), " x ",
                  dy.size(3));
  auto* const to = static_cast<char*>(dx.data_ptr());
  const auto* from = residual ? static_cast<const char*>(residual->data_ptr()) : nullptr;
  bool all = true;  // pixels are seen by a tap
  for (int64_t row = 0; row < rows.stride; ++row) all &= Phase(rows, row).axis.kernel > 0;
  for (int64_t column = 0; column < columns.stride; ++column) all &= Phase(columns, column).axis.kernel > 0;
  if (!all && from != to) {
    const int64_t bytes = dx.size(0) * height * width * pixel;
    if (from)
      std::memcpy(to, from, bytes);
    else
      std::memset(to, 0, bytes);
  }
  for (int64_t row = 0; row < std::min(rows.stride, height); ++row)
    for (int64_t column = 0; column < std::min(columns.stride, width); ++column) {
      const Phase down(rows, row), across(columns, column);
      if (!down.axis.kernel || !across.axis.kernel) continue;
      const int64_t first = (row * width + column) * pixel;
      convolve(dy, found.taps_of(down, across).transposed(), std::nullopt,
               {down.axis,
                across.axis,
                from ? from + first : nullptr,
                to + first,
                {{height, width}, {rows.stride, columns.stride}}},
               1);
    }
}

Tensor conv_dx(const Tensor& dy, const Tensor& weight, const OptionalTensor& residual,
               const std::vector<int64_t>& size, const std::vector<int64_t>& stride,
               const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  const Weight found = weight_for(dy, weight, std::nullopt, true);
  if (residual) require_residual(dy, *residual, found.outputs, size[0], size[1]);
  const Tensor dx = empty_channels_last(dy, {dy.size(0), found.outputs, size[0], size[1]});
  phases(dy, weight, residual, dx, {stride, padding, dilation});
  return dx;
}

void conv_dx_(const Tensor& dy, const Tensor& weight, const Tensor& residual,
              const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
              const std::vector<int64_t>& dilation) {
  const Weight found = weight_for(dy, weight, std::nullopt, true);
  require_residual(dy, residual, found.outputs, residual.size(2), residual.size(3));
  phases(dy, weight, residual, residual, {stride, padding, dilation});
}

}  // namespace
}  // namespace fusedres

STABLE_TORCH_LIBRARY_IMPL(FUSEDRES_NAMESPACE, CPU, m) {
  m.impl("conv", TORCH_BOX(&fusedres::conv));
  m.impl("conv_", TORCH_BOX(&fusedres::conv_));
  m.impl("conv_dx", TORCH_BOX(&fusedres::conv_dx));
  m.impl("conv_dx_", TORCH_BOX(&fusedres::conv_dx_));
}

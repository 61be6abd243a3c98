// What a training step needs of convolutions beside conv_act, as operators of the CPU library.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "../cpu/conv_weights.h"
#include "../cpu/isa.h"
#include "operands.h"

namespace fusedres {
namespace {

// conv_act_pack for one group; `transposed`: of the convolution that takes dy to dx where the stride is 1.
Tensor conv_repack(const Tensor& weight, int64_t tile, bool transposed) {
  STD_TORCH_CHECK(dtype_of(weight) == DType::kFloat32 && weight.dim() == 4,
                  "conv_repack: the weight must be float32, (outputs, inputs, rows, columns)");
  STD_TORCH_CHECK(tile == 1 || tile == 2 || tile == 4, "conv_repack: the tile must be 1, 2 or 4; got ", tile);
  const int64_t rows = weight.size(2), columns = weight.size(3);
  int64_t outputs = weight.size(0), inputs = weight.size(1);
  int64_t strides[] = {weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)};
  const float* begin = static_cast<const float*>(weight.data_ptr());
  if (transposed) {
    begin += (rows - 1) * strides[2] + (columns - 1) * strides[3];
    std::swap(outputs, inputs);
    std::swap(strides[0], strides[1]);
    strides[2] = -strides[2];
    strides[3] = -strides[3];
  }
  const ConvWeights shape{DType::kFloat32, 1, inputs, outputs, rows, columns, tile};
  const Tensor packed = empty_bytes(weight, {outputs, inputs, rows, columns, shape.room()});
  variant_for(DType::kFloat32)
      .conv_repack({inputs, outputs, rows, columns, tile, begin, strides,
                    static_cast<float*>(packed.data_ptr()),
                    packed.numel() / static_cast<int64_t>(sizeof(float))});
  return packed;
}

// Of a 3x3 convolution of stride 1, or an empty tensor where it isn't finite.
Tensor conv_dweight(const Tensor& dy, const Tensor& x, const std::vector<int64_t>& padding, int64_t tile) {
  for (const Tensor* t : {&dy, &x})
    STD_TORCH_CHECK(dtype_of(*t) == DType::kFloat32 && is_channels_last(*t),
                    "conv_dweight: dy and x must be float32 in channels_last; convert them");
  STD_TORCH_CHECK(tile == 2 || tile == 4, "conv_dweight: the tile must be 2 or 4; got ", tile);
  auto axis = [&](int index) {
    const int64_t size = x.size(2 + index), outputs = dy.size(2 + index);
    STD_TORCH_CHECK(dy.size(0) == x.size(0) && outputs == size + 2 * padding[index] - 2,
                    "conv_dweight: dy doesn't belong to a 3x3 convolution of x");
    return ConvAxis{size, outputs, 3, 1, padding[index], 1};
  };
  const Tensor dweight = empty_channels_last(x, {dy.size(1), x.size(1), 3, 3});
  auto floats = [](const Tensor& t) { return static_cast<float*>(t.data_ptr()); };
  const bool finite = variant_for(DType::kFloat32)
                          .conv_dweight({x.size(0), x.size(1), dy.size(1), tile, axis(0), axis(1), floats(x),
                                         floats(dy), floats(dweight)});
  return finite ? dweight : empty_nothing(x);
}

}  // namespace
}  // namespace fusedres

STABLE_TORCH_LIBRARY_IMPL(fusedres_native, CPU, m) {
  m.impl("conv_repack", TORCH_BOX(&fusedres::conv_repack));
  m.impl("conv_dweight", TORCH_BOX(&fusedres::conv_dweight));
}

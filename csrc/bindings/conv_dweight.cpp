// The gradient of a convolution's weights as an operator of the CPU library.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "../cpu/isa.h"
#include "tensors.h"

namespace fusedres {
namespace {

struct Windows {
  const std::vector<int64_t>&kernel, &stride, &padding, &dilation;

  ConvAxis axis(const Tensor& x, int index) const {
    const int64_t size = x.size(2 + index);
    const int64_t k = kernel[index], s = stride[index], p = padding[index], d = dilation[index];
    return {size, (size + 2 * p - d * (k - 1) - 1) / s + 1, k, s, p, d};
  }
  bool of_winograd(int index) const {
    return kernel[index] == 3 && stride[index] == 1 && dilation[index] == 1;
  }
};

void require_form(DType dtype, const Windows& windows, int64_t tile) {
  if (tile == 1) return;
  STD_TORCH_CHECK(tile == 2 || tile == 4 || (tile == 7 && dtype == DType::kBFloat16),
                  "conv_dweight: the tile must be 1, 2, 4 or, in bfloat16, 7; got ", tile);
  STD_TORCH_CHECK(windows.of_winograd(0) && windows.of_winograd(1),
                  "conv_dweight: tiles are for 3x3 windows of stride and dilation 1; give a tile of 1");
}

// By Winograd's form an empty tensor where it isn't finite.
Tensor conv_dweight(const Tensor& dy, const Tensor& x, const std::vector<int64_t>& kernel,
                    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                    const std::vector<int64_t>& dilation, int64_t tile) {
  const DType dtype = dtype_of(x);
  STD_TORCH_CHECK((dtype == DType::kFloat32 || dtype == DType::kBFloat16) && dtype_of(dy) == dtype &&
                      is_channels_last(x) && is_channels_last(dy),
                  "conv_dweight: its tensors must be in channels_last, both float32 or both bfloat16; "
                  "convert them");
  const Windows windows{kernel, stride, padding, dilation};
  require_form(dtype, windows, tile);
  const ConvAxis rows = windows.axis(x, 0), columns = windows.axis(x, 1);
  STD_TORCH_CHECK(dy.size(0) == x.size(0) && dy.size(2) == rows.outputs && dy.size(3) == columns.outputs,
                  "conv_dweight: dy doesn't belong to this convolution of x");
  const Tensor dweight =
      empty_channels_last_accumulation(x, {dy.size(1), x.size(1), rows.kernel, columns.kernel});
  const bool finite = variant_for(dtype).conv_dweight(
      {x.size(0), x.size(1), dy.size(1), tile, rows, columns, dtype, x.data_ptr(), dy.data_ptr(),
       static_cast<float*>(dweight.data_ptr()), torch::stable::get_num_threads()});
  return finite ? dweight : empty_accumulation(x, {0});
}

}  // namespace
}  // namespace fusedres

STABLE_TORCH_LIBRARY_IMPL(FUSEDRES_NAMESPACE, CPU, m) {
  m.impl("conv_dweight", TORCH_BOX(&fusedres::conv_dweight));
}

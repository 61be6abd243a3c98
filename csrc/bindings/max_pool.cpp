// A max-pool without positions as an operator of the CPU library.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "operands.h"
#include "recording.h"

namespace fusedres {
namespace {

// How many windows there are is y's to say: eager may round up.
PoolAxis axis(const Tensor& x, const Tensor& y, int index, const std::vector<int64_t>& kernel,
              const std::vector<int64_t>& stride, const std::vector<int64_t>& padding) {
  const PoolAxis found{x.size(2 + index), y.size(2 + index), kernel[index], stride[index], padding[index]};
  STD_TORCH_CHECK(found.outputs > 0 && found.kernel > found.padding && found.padding >= 0 &&
                      found.stride > 0 && found.start(found.outputs - 1) < found.size,
                  "max_pool: y doesn't belong to these windows of x");
  return found;
}

void max_pool_out(const Tensor& x, const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                  const std::vector<int64_t>& padding, const Tensor& y) {
  const DType dtype = dtype_of(x);
  STD_TORCH_CHECK(is_channels_last(x) && is_channels_last(y), "max_pool: x and y must be in channels_last");
  STD_TORCH_CHECK(dtype_of(y) == dtype && y.size(0) == x.size(0) && y.size(1) == x.size(1),
                  "max_pool: y must have x's images, channels and dtype");
  const Pool pool{axis(x, y, 0, kernel, stride, padding), axis(x, y, 1, kernel, stride, padding)};
  run(MaxPool{{x.size(0), x.size(1), x.size(2) * x.size(3), Order::kPixels},
              dtype,
              x.data_ptr(),
              pool,
              y.data_ptr()});
}

}  // namespace
}  // namespace fusedres

STABLE_TORCH_LIBRARY_IMPL(fusedres_native, CPU, m) {
  m.impl("max_pool_out", TORCH_BOX(&fusedres::max_pool_out));
}

#include "tensors.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/shim_utils.h>

#include <utility>

namespace fusedres {
namespace {

using torch::headeronly::ScalarType;

int64_t elements_of(const std::vector<int64_t>& sizes) {
  int64_t elements = 1;
  for (const int64_t size : sizes) elements *= size;
  return elements;
}

Tensor empty_strided(const Tensor& like, int32_t dtype, const std::vector<int64_t>& sizes,
                     const std::vector<int64_t>& strides) {
  int32_t device;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle made;
  // Of an error only its being one comes through: in words by which callers know eager's.
  STD_TORCH_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                           dtype, device, like.get_device_index(), &made) == TORCH_SUCCESS,
                  device == aoti_torch_device_type_cpu() ? "DefaultCPUAllocator: can't allocate memory"
                                                         : "CUDA out of memory. Can't allocate memory",
                  " for ", elements_of(sizes), " elements");
  return Tensor(made);
}

int32_t raw_dtype(const Tensor& t) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

int32_t accumulation_dtype(const Tensor& t) {
  return dtype_of(t) == DType::kFloat64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
}

std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= sizes[d];
  }
  return strides;
}

std::vector<int64_t> channels_last_strides(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size());
  strides[1] = 1;
  int64_t stride = sizes[1];
  for (size_t d = sizes.size(); d-- > 2;) {
    strides[d] = stride;
    stride *= sizes[d];
  }
  strides[0] = stride;
  return strides;
}

// torch's suggest_memory_format: whether strides read as channels_last, with its answers for sizes of 1.
bool like_channels_last(const Tensor& t) {
  const int64_t dims = t.dim();
  if ((dims != 4 && dims != 5) || t.stride(1) == 0) return false;
  int64_t least = 0;
  auto follows = [&](int64_t d) {
    if (t.size(d) == 0 || t.stride(d) < least) return false;
    if (d == 0 && least == t.stride(1)) return false;
    least = t.stride(d) > 1 ? t.stride(d) * t.size(d) : t.stride(d);
    return true;
  };
  if (!follows(1)) return false;
  for (int64_t d = dims; d-- > 2;)
    if (!follows(d)) return false;
  return follows(0);
}

Memory memory_of(std::vector<int64_t> sizes, bool channels_last) {
  Memory memory{};
  memory.sizes = std::move(sizes);
  memory.channels_last = channels_last;
  memory.strides = channels_last ? channels_last_strides(memory.sizes) : contiguous_strides(memory.sizes);
  memory.images = memory.sizes[0];
  memory.channels = memory.sizes[1];
  memory.pixels = 1;
  for (size_t d = 2; d < memory.sizes.size(); ++d) memory.pixels *= memory.sizes[d];
  return memory;
}

Memory memory_of(const Tensor& t, bool channels_last) {
  return memory_of(std::vector<int64_t>(t.sizes().begin(), t.sizes().end()), channels_last);
}

bool is_dense(const Tensor& t, const Memory& memory) {
  for (size_t d = 0; d < memory.sizes.size(); ++d)
    if (memory.sizes[d] != 1 && t.stride(static_cast<int64_t>(d)) != memory.strides[d]) return false;
  return true;
}

}  // namespace

// Contiguous where it is both, as with one channel or one pixel.
Memory memory_of(const Tensor& x) {
  Memory contiguous = memory_of(x, false);
  return is_dense(x, contiguous) ? contiguous : memory_of(x, like_channels_last(x));
}

Memory memory_of_backward(const Tensor& dy, const std::optional<Tensor>& y, const std::optional<Tensor>& mask,
                          const std::optional<Tensor>& x, const std::optional<Tensor>& residual) {
  const bool one_pixel = dy.numel() == dy.size(0) * dy.size(1);
  if (mask && !one_pixel) return memory_of(dy, mask->dim() == 2);
  for (const auto* told : {&y, &x, &residual})
    if (*told) return memory_of(**told);
  return memory_of(dy);
}

Memory Memory::pooled(int64_t height, int64_t width) const {
  return memory_of({images, channels, height, width}, channels_last);
}

Tensor Memory::empty_output(const Tensor& like) const {
  return empty_strided(like, raw_dtype(like), sizes, strides);
}

Tensor Memory::empty_bytes(const Tensor& like, bool keep) const {
  if (!keep) return empty_strided(like, aoti_torch_dtype_uint8(), {0}, {1});
  return empty_strided(like, aoti_torch_dtype_uint8(), sizes, strides);
}

Tensor Memory::empty_mask(const Tensor& like, bool keep) const {
  if (!keep) return empty_strided(like, aoti_torch_dtype_uint8(), {0}, {1});
  const std::vector<int64_t> mask_sizes = mask_by_pixels()
                                              ? std::vector<int64_t>{images * pixels, (channels + 7) / 8}
                                              : std::vector<int64_t>{images, channels, (pixels + 7) / 8};
  return empty_strided(like, aoti_torch_dtype_uint8(), mask_sizes, contiguous_strides(mask_sizes));
}

Tensor Memory::dense(const Tensor& t) const {
  if (is_dense(t, *this)) return t;
  Tensor copy = empty_output(t);
  return torch::stable::copy_(copy, t);
}

Tensor empty_statistics(const Tensor& x, int64_t statistics) {
  if (!statistics) return empty_accumulation(x, {0});
  return empty_accumulation(x, {3, x.size(1)});
}

Tensor empty_accumulation(const Tensor& x, const std::vector<int64_t>& sizes) {
  return empty_strided(x, accumulation_dtype(x), sizes, contiguous_strides(sizes));
}

Tensor empty_bytes(const Tensor& like, const std::vector<int64_t>& sizes) {
  return empty_strided(like, aoti_torch_dtype_uint8(), sizes, contiguous_strides(sizes));
}

bool is_channels_last(const Tensor& t) { return t.dim() == 4 && is_dense(t, memory_of(t, true)); }

Tensor empty_channels_last(const Tensor& like, const std::vector<int64_t>& sizes) {
  return empty_strided(like, raw_dtype(like), sizes, channels_last_strides(sizes));
}

Tensor empty_channels_last_accumulation(const Tensor& like, const std::vector<int64_t>& sizes) {
  return empty_strided(like, accumulation_dtype(like), sizes, channels_last_strides(sizes));
}

Tensor empty_nothing(const Tensor& x) { return empty_strided(x, raw_dtype(x), {0}, {1}); }

}  // namespace fusedres

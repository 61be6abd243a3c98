// Torch tensors to what the kernels are told, and the results as the fakes of fusedres/ops promise them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "../params.h"

namespace fusedres {

using torch::stable::Tensor;

inline DType dtype_of(const Tensor& t) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, "expected float32, float64, bfloat16 or float16; got another dtype");
  }
}

inline void* pointer(const std::optional<Tensor>& t) { return t ? t->data_ptr() : nullptr; }

// An empty result is one that is not wanted.
inline void* result_pointer(const Tensor& t) { return t.numel() ? t.data_ptr() : nullptr; }
inline uint8_t* mask_pointer(const Tensor& mask) { return static_cast<uint8_t*>(result_pointer(mask)); }

// The strides that an output of eager's batch norm has for an input of these sizes and strides, and what they
// imply.
struct Memory {
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides;
  bool channels_last;  // by the strides of an output, which decide ambiguous cases such as 1x1 pixels
  int64_t images;
  int64_t channels;
  int64_t pixels;

  // Rows of the mask, which begin on a byte each, are pixels and not planes.
  bool mask_by_pixels() const { return channels_last || pixels == 1; }
  // In the memory order of the mask, if there is one; else in whichever order serves ambiguous cases best.
  Shape shape(bool with_mask) const {
    return shape(pixels == 1 || (channels_last && (with_mask || channels > 1)) ? Order::kPixels
                                                                               : Order::kPlanes);
  }
  Shape shape(Order order) const { return {images, channels, pixels, order}; }
  // By the strides alone: what else is stored in this order may have other pixels.
  Order order() const { return channels_last ? Order::kPixels : Order::kPlanes; }
  // Of y, whose images have these sizes.
  Memory pooled(int64_t height, int64_t width) const;
  Tensor empty_output(const Tensor& like) const;
  Tensor empty_bytes(const Tensor& like, bool keep) const;
  Tensor empty_mask(const Tensor& like, bool keep) const;
  // t itself, or its copy in this memory order.
  Tensor dense(const Tensor& t) const;
};

Memory memory_of(const Tensor& x);

// Of the backward, from whichever tensor tells the forward's memory order.
Memory memory_of_backward(const Tensor& dy, const std::optional<Tensor>& y, const std::optional<Tensor>& mask,
                          const std::optional<Tensor>& x, const std::optional<Tensor>& residual);

Tensor empty_statistics(const Tensor& x, int64_t statistics);  // (3, C), or (0,) for an absent norm
Tensor empty_accumulation(const Tensor& x, const std::vector<int64_t>& sizes);  // in the accumulation dtype
// Whether t is dense in channels_last order, whatever its strides along sizes of 1.
bool is_channels_last(const Tensor& t);
Tensor empty_channels_last(const Tensor& like, const std::vector<int64_t>& sizes);
Tensor empty_channels_last_accumulation(const Tensor& like, const std::vector<int64_t>& sizes);
Tensor empty_nothing(const Tensor& x);
Tensor empty_bytes(const Tensor& like, const std::vector<int64_t>& sizes);

}  // namespace fusedres

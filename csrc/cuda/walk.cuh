// Where a thread finds its elements.
#pragma once

#include "machine.cuh"

namespace fusedres::cuda {

struct Place {
  int64_t element;
  int inner;    // within the row: a channel of a pixel, or a pixel of a plane
  int row;      // of memory: a pixel, or a plane
  bool active;  // otherwise there is nothing here
};

template <int V, Order kOrder>
class Walk {
 public:
  FUSEDRES_DEVICE Walk(const Cut& cut, int group, int part) : cut_(cut), group_(group) {
    const int begin = part * cut.part_size, left = cut.size - begin;
    end_ = begin + (left < cut.part_size ? left : cut.part_size);
    first_ = begin + thread() / cut.lanes;
    channel_ = kOrder == Order::kPixels ? (group * cut.lanes + thread() % cut.lanes) * V : group;
    steps_ = (end_ - begin + cut.stride() - 1) / cut.stride();
  }

  FUSEDRES_DEVICE int steps() const { return steps_; }  // of the block: the same for all its threads
  // The first of the channels of the thread's packs.
  FUSEDRES_DEVICE int channel() const { return channel_; }

  FUSEDRES_DEVICE Place at(int step) const {
    return place(static_cast<unsigned>(first_) + static_cast<unsigned>(step) * cut_.stride());
  }

  // An element to read for the thread's channels, near its first one, even where that is not active.
  FUSEDRES_DEVICE int64_t near_first() const {
    const Place found = place(static_cast<unsigned>(first_ < end_ ? first_ : end_ - 1));
    return found.active ? found.element : found.element - found.inner;
  }

  FUSEDRES_DEVICE int image(const Place& at) const {
    return at.row / static_cast<int>(kOrder == Order::kPixels ? cut_.shape.pixels : cut_.shape.channels);
  }

  // The mask's byte, and where in it the pack begins.
  FUSEDRES_DEVICE int64_t mask_byte(const Place& at) const {
    return at.row * cut_.shape.mask_row_bytes() + at.inner / 8;
  }
  FUSEDRES_DEVICE int mask_shift(const Place& at) const { return V == 8 ? 0 : at.inner % 8; }

 private:
  // Unsigned: the last steps of a thread may pass 2^31.
  FUSEDRES_DEVICE Place place(unsigned index) const {
    const Shape& shape = cut_.shape;
    const int row = static_cast<int>(index);
    const bool inside = index < static_cast<unsigned>(end_);
    if constexpr (kOrder == Order::kPixels) {
      return {row * shape.channels + channel_, channel_, row, inside && channel_ < shape.channels};
    } else {
      const unsigned image = index / static_cast<unsigned>(cut_.plane_positions);
      const int pixel = static_cast<int>(index - image * cut_.plane_positions) * V;
      const int plane = static_cast<int>(image) * static_cast<int>(shape.channels) + group_;
      return {plane * shape.pixels + pixel, pixel, plane, inside && pixel < shape.pixels};
    }
  }

  const Cut& cut_;
  const int group_;
  int first_, end_, channel_, steps_;
};

}  // namespace fusedres::cuda

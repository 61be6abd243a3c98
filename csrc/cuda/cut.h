// How a tensor is cut among blocks and threads.
//
// A group is a set of neighbouring channels whose sums are finished together: a tile of a pixel's channels,
// or one channel of planes. A unit is a part of a group, done by one block: rows of pixels, or positions
// (packs) of a channel's planes, counted through all images. A thread's steps are `stride` rows or positions
// apart.
#pragma once

#include "../params.h"

namespace fusedres::cuda {

#if !defined(FUSEDRES_CUDA_THREADS)
#define FUSEDRES_CUDA_THREADS 512
#endif
constexpr int kThreads = FUSEDRES_CUDA_THREADS;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;

// Rows, positions, parts and groups are counted in 32 bits, elements in 64.
struct Cut {
  Shape shape;
  int pack;             // elements of one access
  int lanes;            // neighbouring threads along a pixel's channels; 1 for planes
  int plane_positions;  // of a plane: whole bytes of its mask; 0 for pixels
  int groups;
  int parts;      // of a group
  int part_size;  // rows or positions; the last part may be smaller
  int size;       // rows or positions of a group

  FUSEDRES_HOST_DEVICE int units() const { return groups * parts; }
  FUSEDRES_HOST_DEVICE int stride() const { return kThreads / lanes; }
  FUSEDRES_HOST_DEVICE int steps() const { return (part_size + stride() - 1) / stride(); }
  FUSEDRES_HOST_DEVICE int group_channels() const { return shape.order == Order::kPixels ? lanes * pack : 1; }
  FUSEDRES_HOST_DEVICE int64_t padded_channels() const { return int64_t{groups} * group_channels(); }
};

// Rows or positions of a channel.
inline int64_t group_size(const Shape& shape, int pack) {
  constexpr int kMaskBits = 8;
  if (shape.order == Order::kPixels) return shape.rows();
  return shape.images * ((shape.pixels + kMaskBits - 1) / kMaskBits * (kMaskBits / pack));
}

// The cut of a tensor into whole groups, one part each.
inline Cut cut_groups(const Shape& shape, int pack) {
  const int size = static_cast<int>(group_size(shape, pack));
  if (shape.order == Order::kPlanes) {
    const int positions = size / static_cast<int>(shape.images);
    return {shape, pack, 1, positions, static_cast<int>(shape.channels), 1, size, size};
  }
  // 128 bytes of a row, fewer where there are fewer channels; the threads of one byte of the mask are
  // neighbours.
  const int packs = static_cast<int>((shape.channels + pack - 1) / pack), most = pack == 1 ? 16 : 8;
  int lanes = 8 / pack;
  while (lanes < most && lanes < packs) lanes *= 2;
  return {shape, pack, lanes, 0, (packs + lanes - 1) / lanes, 1, size, size};
}

// At most `parts` parts, each of whole steps of all threads, so that one begins on a byte of a plane's mask.
inline Cut cut_parts(Cut cut, int64_t parts) {
  const int64_t unit = cut.stride(), each = (cut.size + parts - 1) / parts;
  cut.part_size = static_cast<int>((each + unit - 1) / unit * unit);
  cut.parts = static_cast<int>((int64_t{cut.size} + cut.part_size - 1) / cut.part_size);
  return cut;
}

// One part an image.
inline Cut cut_images(Cut cut) {
  cut.parts = static_cast<int>(cut.shape.images);
  cut.part_size = cut.size / cut.parts;
  return cut;
}

}  // namespace fusedres::cuda

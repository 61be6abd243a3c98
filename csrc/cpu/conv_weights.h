// How conv_act's weights are packed: the same for every instruction set, padded with zeros.
//
//   direct    (groups, blocks, rows, columns, inputs, width)
//   Winograd  (points, blocks, inputs, width)               where tile > 1: no groups, 3x3
//
// A block is `kWidth` output channels; a group's last one is half as wide where that is enough.
#pragma once

#include <cstdint>

#include "../hostdevice.h"

namespace fusedres {

struct ConvWeights {
  static constexpr int64_t kPanel = 16;
  static constexpr int64_t kWidth = 2 * kPanel;

  int64_t groups;
  int64_t inputs;   // of a group
  int64_t outputs;  // of a group
  int64_t rows;     // of a window
  int64_t columns;
  int64_t tile;  // the side of Winograd's tiles of y, 1: none

  FUSEDRES_HOST_DEVICE int64_t padded() const { return (outputs + kPanel - 1) / kPanel * kPanel; }
  FUSEDRES_HOST_DEVICE int64_t blocks() const { return (padded() + kWidth - 1) / kWidth; }
  FUSEDRES_HOST_DEVICE int64_t width(int64_t block) const {
    return padded() - block * kWidth < kWidth ? kPanel : kWidth;
  }
  FUSEDRES_HOST_DEVICE int64_t side() const { return tile > 1 ? tile + 2 : 0; }  // of a transformed tile
  FUSEDRES_HOST_DEVICE int64_t depth() const { return rows * columns * inputs; }

  // Where a block begins.
  FUSEDRES_HOST_DEVICE int64_t direct(int64_t group, int64_t block) const {
    return (group * padded() + block * kWidth) * depth();
  }
  FUSEDRES_HOST_DEVICE int64_t winograd(int64_t point, int64_t block) const {
    return groups * padded() * depth() + (point * padded() + block * kWidth) * inputs;
  }
  FUSEDRES_HOST_DEVICE int64_t elements() const { return winograd(side() * side(), 0); }
  // How many times the unpacked weights' memory.
  FUSEDRES_HOST_DEVICE int64_t room() const {
    const int64_t unpacked = groups * outputs * depth();
    return (elements() + unpacked - 1) / unpacked;
  }
};

// packed <- weight, (groups * outputs, inputs, rows, columns) with these strides; the rest of its `count`
// values is 0.
void conv_pack(const ConvWeights& shape, const float* weight, const int64_t* strides, float* packed,
               int64_t count);

}  // namespace fusedres

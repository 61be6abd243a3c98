// How conv_act's weights are packed: the same for every instruction set, padded with zeros.
//
//   direct    (groups, blocks, taps, steps of a run, width, inputs of a step)   T
//   Winograd  (points, blocks, inputs, width)                                   float32, where tile > 1
//
// A block is `kWidth` output channels; a group's last one is half as wide where that is enough. A tap is what
// of a window lies in one run in memory: the inputs of a pixel, or of a row of pixels where there are few
// inputs. A step is what one product takes: one float32 or two bfloat16. Winograd's form has no groups, and
// 3x3 windows.
//
// Groups of so few channels that several fill a vector are a bundle: they are packed as one group of all
// outputs, each with the inputs of its own group.
#pragma once

#include "../params.h"

namespace fusedres {

struct ConvWeights {
  static constexpr int64_t kPanel = 16;
  static constexpr int64_t kWidth = 2 * kPanel;

  DType dtype;
  int64_t groups;
  int64_t inputs;   // of a group
  int64_t outputs;  // of a group
  int64_t rows;     // of a window
  int64_t columns;
  int64_t tile;        // the side of Winograd's tiles of y, 1: none
  int64_t bundle = 0;  // channels of each group that was, if they are a bundle

  // `outputs` of a group.
  static ConvWeights of(DType dtype, int64_t groups, int64_t inputs, int64_t outputs, int64_t rows,
                        int64_t columns, int64_t tile) {
    const bool few = inputs == outputs && (outputs == 2 || outputs == 4 || outputs == 8);
    if (groups > 1 && few) return {dtype, 1, inputs, groups * outputs, rows, columns, tile, inputs};
    return {dtype, groups, inputs, outputs, rows, columns, tile};
  }

  int64_t padded() const { return (outputs + kPanel - 1) / kPanel * kPanel; }
  int64_t blocks() const { return (padded() + kWidth - 1) / kWidth; }
  int64_t width(int64_t block) const { return padded() - block * kWidth < kWidth ? kPanel : kWidth; }
  int64_t side() const { return tile > 1 ? tile + 2 : 0; }  // of a transformed tile

  // The first channel of x that a block's first output reads.
  int64_t source(int64_t group, int64_t block) const { return bundle ? block * kWidth : group * inputs; }

  bool flat() const { return groups == 1 && !bundle && columns > 1 && inputs < kPanel; }
  int64_t taps() const { return flat() ? rows : rows * columns; }
  int64_t run() const { return flat() ? columns * inputs : inputs; }  // of a tap
  int64_t step() const { return dtype == DType::kBFloat16 ? 2 : 1; }
  int64_t steps() const { return (run() + step() - 1) / step(); }
  int64_t depth() const { return taps() * steps() * step(); }  // with what pads the last steps

  // Where a block begins, in elements of T.
  int64_t direct(int64_t group, int64_t block) const { return (group * padded() + block * kWidth) * depth(); }
  // In float32 from the end of the direct form, which is whole cache lines.
  int64_t winograd(int64_t point, int64_t block) const {
    return (point * padded() + block * kWidth) * inputs;
  }
  int64_t elements() const {
    return direct(groups, 0) + winograd(side() * side(), 0) * (size_of(DType::kFloat32) / size_of(dtype));
  }
  // Bytes, for each of the weights.
  int64_t room() const {
    const int64_t unpacked = groups * outputs * inputs * rows * columns;
    return (elements() + unpacked - 1) / unpacked * size_of(dtype);
  }
};

// packed <- weight, (groups * outputs, inputs, rows, columns) T with these strides; the rest of its `bytes`
// is 0.
void conv_pack(const ConvWeights& shape, const void* weight, const int64_t* strides, void* packed,
               int64_t bytes);

}  // namespace fusedres

// What conv_act's forms make of its operands.
#pragma once

#include "conv_block.h"

namespace fusedres::FUSEDRES_ISA {

inline ConvWeights weights_of(const ConvAct& op) {
  return ConvWeights::of(op.dtype, op.groups, op.inputs / op.groups, op.outputs / op.groups, op.rows.kernel,
                         op.columns.kernel, op.tile);
}

// The result of a block of channels of y's pixels from `pixel` on.
template <class T>
ConvResult<T> result_of(const ConvAct& op, int64_t pixel, int64_t group, int64_t block) {
  const int64_t outputs = weights_of(op).outputs, within = block * ConvWeights::kWidth;
  const int64_t channel = group * outputs + within, at = pixel * op.outputs + channel;
  return {op.bias ? op.bias + channel : nullptr,
          op.residual ? static_cast<const T*>(op.residual) + at : nullptr,
          static_cast<T*>(op.y) + at,
          op.outputs,
          minimum(ConvWeights::kWidth, outputs - within),
          static_cast<Act>(op.act),
          op.scale ? op.scale + channel : nullptr};
}

// The products of a tile of y's pixels, block by block of channels. Pixels that are spread are computed side
// by side and then brought to their places.
template <class T>
class TileProducts {
 public:
  TileProducts(const ConvAct& op, int64_t most_pixels, Arena& arena)
      : op_(op), beside_(op.spread.size[0] ? arena.take<T>(most_pixels * kWidth) : nullptr) {}

  void compute(const ConvRows<T>& rows, const T* weights, int64_t width, int64_t group, int64_t block,
               int64_t pixel, int64_t count) const {
    if (!beside_) return conv_block<T>(rows, weights, width, result_of<T>(op_, pixel, group, block), count);
    ConvResult<T> to = result_of<T>(op_, 0, group, block);
    const T* const residual = to.residual;
    T* const y = to.y;
    const int64_t bytes = to.channels * int64_t{sizeof(T)};
    to.y = beside_;
    to.stride = kWidth;
    if (residual) {
      to.residual = beside_;
      each_place(pixel, count, [&](int64_t i, int64_t at) {
        __builtin_memcpy(beside_ + i * kWidth, residual + at, bytes);
      });
    }
    conv_block<T>(rows, weights, width, to, count);
    each_place(pixel, count,
               [&](int64_t i, int64_t at) { __builtin_memcpy(y + at, beside_ + i * kWidth, bytes); });
  }

 private:
  static constexpr int64_t kWidth = ConvWeights::kWidth;

  // visit(i, where the i-th of these pixels lies)
  template <class Visit>
  void each_place(int64_t pixel, int64_t count, const Visit& visit) const {
    const auto& [size, step] = op_.spread;
    const int64_t down = op_.rows.outputs, across = op_.columns.outputs;
    int64_t row = pixel / across, column = pixel % across;
    for (int64_t i = 0; i < count; ++row, column = 0)
      for (const int64_t of_image = (row / down * size[0] + row % down * step[0]) * size[1];
           column < across && i < count; ++column, ++i)
        visit(i, (of_image + column * step[1]) * op_.outputs);
  }

  const ConvAct& op_;
  T* const beside_;  // (pixels, kWidth), or null
};

}  // namespace fusedres::FUSEDRES_ISA

// conv_act's rows where products take x in float32 and x is not.
#pragma once

#include "conv_operands.h"

namespace fusedres::FUSEDRES_ISA {

// Neighbouring pixels of y, across rows and images, and a copy of what their windows see: of a row of y, the
// rows of x that its windows reach, from the first window's first column to the last one's last, with zeros
// beyond the border. Windows that don't overlap, or whose values shall lie side by side and don't, are copied
// one by one.
template <class T>
class WidenedTile {
 public:
  // What one pixel's window sees.
  static int64_t bytes(const ConvAct& op) {
    return op.rows.kernel * slots(op, 1) * op.inputs * int64_t{sizeof(float)};
  }

  WidenedTile(const ConvAct& op, int64_t most_pixels, Arena& arena)
      : op_(op),
        weights_(weights_of(op)),
        apart_(is_apart(op)),
        slot_(op.inputs + (gapped(op) ? kGap : 0)),
        taps_(weights_.taps()),
        pitch_(ceil_div(most_pixels, kRows) * kRows),
        begin_(arena.take<const float*>((taps_ + 1) * pitch_)),
        zeros_(arena.take<float>(maximum(weights_.run(), op.inputs))),
        copies_(arena.take<float>(op.rows.kernel * room(op, most_pixels) * slot_)),
        products_(op, most_pixels, arena) {
    for (int64_t i = 0; i < maximum(weights_.run(), op.inputs); ++i) zeros_[i] = 0;
    for (int64_t i = 0; i < pitch_; ++i) begin_[taps_ * pitch_ + i] = zeros_;
  }

  void place(int64_t pixel, int64_t count) {
    pixel_ = pixel;
    count_ = count;
    const int64_t across = op_.columns.outputs;
    int64_t row = pixel / across, column = pixel % across;
    float* to = copies_;
    for (int64_t i = 0; i < count; ++row, column = 0) {
      const int64_t some = minimum(across - column, count - i);
      to = place_row(row, column, some, begin_ + i, to);
      i += some;
    }
    for (int64_t tap = 0; tap < taps_; ++tap)
      for (int64_t i = count; i < ceil_div(count, kRows) * kRows; ++i) begin_[tap * pitch_ + i] = zeros_;
  }

  // y's block of channels; meanwhile the next block's weights come into the cache. Copies are never cold.
  void compute(int64_t group, int64_t block, const T* weights, const T* next_weights = nullptr,
               bool = false) const {
    const ConvRows<T> rows{begin_, pitch_,         weights_.source(group, block),
                           taps_,  weights_.run(), next_weights,
                           false,  weights_.bundle};
    products_.compute(rows, weights, weights_.width(block), group, block, pixel_, count_);
  }

 private:
  static constexpr int64_t kGap = 16;

  static int64_t reach(const ConvAxis& axis) { return (axis.kernel - 1) * axis.dilation + 1; }
  static bool is_apart(const ConvAct& op) {
    return op.columns.stride >= reach(op.columns) || (weights_of(op).flat() && op.columns.dilation > 1);
  }
  // Pixels of x that `count` neighbouring windows see in one row of x, and those of all rows of a tile.
  static int64_t slots(const ConvAct& op, int64_t count) {
    return is_apart(op) ? count * op.columns.kernel : (count - 1) * op.columns.stride + reach(op.columns);
  }
  static int64_t room(const ConvAct& op, int64_t pixels) {
    const int64_t rows = minimum(pixels, pixels / op.columns.outputs + 2);
    return slots(op, pixels) + (rows - 1) * slots(op, 1);
  }
  // Rows that would fall on each other in the first-level cache.
  static bool gapped(const ConvAct& op) {
    constexpr int64_t kPageBytes = 4096;
    const int64_t between = is_apart(op) ? op.columns.kernel : op.columns.stride;
    return !weights_of(op).flat() && between * op.inputs * int64_t{sizeof(float)} % kPageBytes == 0;
  }

  // `count` windows from `column` on in one row of y, which counts across images.
  float* place_row(int64_t row, int64_t column, int64_t count, const float** begin, float* to) {
    const ConvAxis &rows = op_.rows, &columns = op_.columns;
    const int64_t row_length = columns.size * op_.inputs, across = weights_.flat() ? 1 : columns.kernel;
    const int64_t window = (apart_ ? columns.kernel : columns.stride) * slot_;
    const int64_t tap = (apart_ ? 1 : columns.dilation) * slot_;
    const T* const image = static_cast<const T*>(op_.x) + row / rows.outputs * rows.size * row_length;
    for (int64_t i = 0; i < rows.kernel; ++i) {
      const int64_t of_x = rows.place(row % rows.outputs, i);
      const bool inside = rows.inside(of_x);
      for (int64_t j = 0; j < across; ++j, begin += pitch_)
        for (int64_t k = 0; k < count; ++k) begin[k] = inside ? to + k * window + j * tap : zeros_;
      if (inside) to = copy_row(image + of_x * row_length, column, count, to);
    }
    return to;
  }

  float* copy_row(const T* x_row, int64_t column, int64_t count, float* to) const {
    const ConvAxis& columns = op_.columns;
    if (!apart_) return copy_pixels(x_row, columns.place(column, 0), slots(op_, count), to);
    const bool whole = columns.dilation == 1;
    for (int64_t k = column; k < column + count; ++k)
      for (int64_t j = 0; j < columns.kernel; j += whole ? columns.kernel : 1)
        to = copy_pixels(x_row, columns.place(k, j), whole ? columns.kernel : 1, to);
    return to;
  }

  // Neighbouring pixels, zeros beyond the border.
  float* copy_pixels(const T* x_row, int64_t first, int64_t count, float* to) const {
    const int64_t begin = minimum(maximum<int64_t>(first, 0), first + count);
    const int64_t end = maximum(begin, minimum(first + count, op_.columns.size));
    for (float* zero = to; zero < to + (begin - first) * slot_; ++zero) *zero = 0;
    to += (begin - first) * slot_;
    const T* const x = x_row + begin * op_.inputs;
    if (slot_ == op_.inputs)
      widen_run(x, (end - begin) * slot_, to);
    else
      for (int64_t k = 0; k < end - begin; ++k) widen_run(x + k * op_.inputs, op_.inputs, to + k * slot_);
    to += (end - begin) * slot_;
    for (float* const last = to + (first + count - end) * slot_; to < last; ++to) *to = 0;
    return to;
  }

  static void widen_run(const T* from, int64_t count, float* to) {
    constexpr int kLanes = Vec<float>::kLanes;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i, AllLanes{}));
    if (i < count) {
      const FirstLanes lanes{static_cast<int>(count - i)};
      store(to + i, load(from + i, lanes), lanes);
    }
  }

  const ConvAct& op_;
  const ConvWeights weights_;
  const bool apart_;    // windows are copied one by one
  const int64_t slot_;  // from a pixel's copy to the next one's
  const int64_t taps_;
  const int64_t pitch_;
  const float** begin_;  // (taps, pitch)
  float* zeros_;
  float* copies_;
  const TileProducts<T> products_;
  int64_t pixel_ = 0;
  int64_t count_ = 0;
};

}  // namespace fusedres::FUSEDRES_ISA

// The operands of conv_dweight's direct form. A step is two neighbouring pixels of dy, across rows and
// images, and what their windows see of x; a point is a tap of the window. Where there are few inputs the
// whole window is one point, and a tap is one of its rows.
#pragma once

#include "conv_dweight.h"

namespace fusedres::FUSEDRES_ISA {

// What is wanted soon, to be brought into the cache by equal slices.
struct Ahead {
  const BFloat16 *dy, *x;
  int64_t of_dy, of_x;  // values
  int64_t slice;        // values

  const BFloat16* at(int64_t i) const {
    const int64_t value = i * slice;
    return value < of_dy ? dy + value : x + minimum(value - of_dy, of_x);
  }
};

class Pairs {
 public:
  explicit Pairs(const ConvDweight& op)
      : op_(op),
        x_(static_cast<const BFloat16*>(op.x)),
        dy_(static_cast<const BFloat16*>(op.dy)),
        flat_(op.inputs < kPanel),
        across_(flat_ ? op.columns.kernel : 1),
        values_(across_ * op.inputs),
        pixels_(op.images * op.rows.outputs * op.columns.outputs) {}

  int64_t steps() const { return ceil_div(pixels_, 2); }
  int64_t window() const { return op_.rows.kernel * op_.columns.kernel * op_.inputs; }
  int64_t points() const { return flat_ ? 1 : op_.rows.kernel * op_.columns.kernel; }
  int64_t channels() const { return window() / points(); }

  // Room for so many steps.
  struct Operands {
    Panels<BFloat16> x, dy;
    const BFloat16* zeros;
  };
  Operands operands(int64_t steps, Arena& arena) const {
    Operands to{{channels(), steps, flat_, nullptr}, {op_.outputs, steps, false, nullptr}, nullptr};
    to.x.begin = arena.take<BFloat16>(points() * to.x.point());
    to.dy.begin = arena.take<BFloat16>(to.dy.point());
    const int64_t most = maximum(values_, op_.outputs);
    auto* const zeros = arena.take<BFloat16>(most);
    for (int64_t i = 0; i < most; ++i) zeros[i] = {};
    to.zeros = zeros;
    return to;
  }

  // Steps [begin, end) of those from `first` on. The last one of all may have one pixel.
  void place(const Operands& to, int64_t first, int64_t begin, int64_t end) const {
    Arena arena;
    BFloat16* const copies = flat_ ? arena.take<BFloat16>(2 * values_) : nullptr;
    int64_t pixel = 2 * (first + begin);
    Pixel one = pixel_at(pixel), other = after(one);
    for (int64_t step = begin; step < end; ++step, pixel += 2, one = after(other), other = after(one)) {
      const BFloat16* const dy = dy_ + pixel * op_.outputs;
      place_pair(dy, pixel + 1 < pixels_ ? dy + op_.outputs : to.zeros, op_.outputs, to.dy.at(0, 0, step),
                 to.dy.panel());
      const Window window = window_of(one), other_window = window_of(other);
      BFloat16* at = to.x.at(0, 0, step);
      for (int64_t i = 0; i < op_.rows.kernel; ++i)
        for (int64_t j = 0; j < op_.columns.kernel; j += across_, at += flat_ ? 2 * values_ : to.x.point()) {
          const BFloat16* const from = tap(window, i, j, to.zeros, copies);
          place_pair(from, tap(other_window, i, j, to.zeros, copies + values_), values_, at, to.x.panel());
        }
    }
  }

  // What `steps` from `first` on read for the first time: the last taps of their windows. Where windows leave
  // gaps, it is too little of what lies there.
  Ahead ahead(int64_t first, int64_t steps, int64_t slices) const {
    const int64_t begin = minimum(2 * first, pixels_ - 1), end = minimum(2 * (first + steps), pixels_);
    const bool gaps = op_.rows.kernel < op_.rows.stride;
    const BFloat16* const x = last_tap(begin);
    const int64_t of_x = gaps || end <= begin ? 0 : last_tap(end - 1) + op_.inputs - x;
    const int64_t of_dy = maximum<int64_t>(0, end - begin) * op_.outputs;
    return {dy_ + begin * op_.outputs, x, of_dy, of_x, ceil_div(of_dy + of_x, slices)};
  }

 private:
  struct Pixel {
    int64_t image, row, column;
  };
  Pixel pixel_at(int64_t pixel) const {
    const int64_t row = pixel / op_.columns.outputs;
    return {row / op_.rows.outputs, row % op_.rows.outputs, pixel % op_.columns.outputs};
  }
  Pixel after(Pixel pixel) const {
    if (++pixel.column < op_.columns.outputs) return pixel;
    pixel.column = 0;
    if (++pixel.row < op_.rows.outputs) return pixel;
    return {pixel.image + 1, 0, 0};
  }

  const BFloat16* image(int64_t index) const {
    return x_ + index * op_.rows.size * op_.columns.size * op_.inputs;
  }

  const BFloat16* last_tap(int64_t pixel) const {
    auto inside = [](const ConvAxis& axis, int64_t o) {
      return minimum(maximum<int64_t>(0, axis.place(o, axis.kernel - 1)), axis.size - 1);
    };
    const Pixel at = pixel_at(pixel);
    const int64_t row = inside(op_.rows, at.row), column = inside(op_.columns, at.column);
    return image(at.image) + (row * op_.columns.size + column) * op_.inputs;
  }

  struct Window {
    const BFloat16* image;  // null: a pixel that isn't there
    int64_t row, column;    // where it begins
    bool whole;             // inside x, each tap in one piece
  };
  Window window_of(const Pixel& pixel) const {
    const ConvAxis &rows = op_.rows, &columns = op_.columns;
    if (pixel.image == op_.images) return {nullptr, 0, 0, false};
    const int64_t row = rows.place(pixel.row, 0), column = columns.place(pixel.column, 0);
    const bool whole = rows.inside(row) && rows.inside(rows.place(pixel.row, rows.kernel - 1)) &&
                       columns.inside(column) &&
                       columns.inside(columns.place(pixel.column, columns.kernel - 1)) &&
                       (across_ == 1 || columns.dilation == 1);
    return {image(pixel.image), row, column, whole};
  }

  // Where a tap lies in x, or zeros, or a copy with zeros beyond the border.
  FUSEDRES_INLINE const BFloat16* tap(const Window& window, int64_t i, int64_t j, const BFloat16* zeros,
                                      BFloat16* copy) const {
    const ConvAxis &rows = op_.rows, &columns = op_.columns;
    const int64_t row = window.row + i * rows.dilation, column = window.column + j * columns.dilation;
    if (window.whole) return window.image + (row * columns.size + column) * op_.inputs;
    if (!window.image || !rows.inside(row)) return zeros;
    const BFloat16* const x_row = window.image + row * columns.size * op_.inputs;
    if (!flat_) return columns.inside(column) ? x_row + column * op_.inputs : zeros;
    copy_row(x_row, column, copy);
    return copy;
  }
  void copy_row(const BFloat16* x_row, int64_t column, BFloat16* to) const {
    for (int64_t j = 0; j < across_; ++j, column += op_.columns.dilation)
      for (int64_t i = 0; i < op_.inputs; ++i, ++to)
        *to = op_.columns.inside(column) ? x_row[column * op_.inputs + i] : BFloat16{};
  }

  // Each channel's values of two pixels side by side, in panels. What fills up the last panel is multiplied,
  // and not stored.
  FUSEDRES_INLINE static void place_pair(const BFloat16* one, const BFloat16* other, int64_t count,
                                         BFloat16* to, int64_t panel) {
    constexpr int64_t kLanes = Vec<float>::kLanes;
    auto place = [&](int64_t i, auto lanes) FUSEDRES_INLINE_LAMBDA {
      const Words low = bit_cast<Words>(load(one + i, lanes).v) >> 16;
      const Words pairs = low | bit_cast<Words>(load(other + i, lanes).v);
      store(reinterpret_cast<float*>(to + i % kPanel * 2), Vec<float>{bit_cast<Vec<float>::Native>(pairs)},
            lanes);
    };
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes, to += i % kPanel ? 0 : panel) place(i, AllLanes{});
    if (i < count) place(i, FirstLanes{static_cast<int>(count - i)});
  }

  const ConvDweight& op_;
  const BFloat16* const x_;
  const BFloat16* const dy_;
  const bool flat_;
  const int64_t across_;  // columns of a tap
  const int64_t values_;  // of a tap
  const int64_t pixels_;
};

}  // namespace fusedres::FUSEDRES_ISA

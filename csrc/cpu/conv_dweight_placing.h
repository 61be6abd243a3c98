// The operands of conv_dweight's direct form. A step is a pixel of dy, where bfloat16 is multiplied as such
// two neighbouring ones, across rows and images, and what their windows see of x; a point is a tap of the
// window. Where there are few inputs the whole window is one point, and a tap is one of its rows.
#pragma once

#include "conv_dweight.h"

namespace fusedres::FUSEDRES_ISA {

// What is wanted soon, to be brought into the cache by equal slices.
template <class T>
struct Ahead {
  const T *dy, *x;
  int64_t of_dy, of_x;  // values
  int64_t slice;        // values

  const T* at(int64_t i) const {
    const int64_t value = i * slice;
    return value < of_dy ? dy + value : x + minimum(value - of_dy, of_x);
  }
};

template <class T>
class Placing {
  using V = Value<T>;
  static constexpr int64_t kPixels = Product<V>::kInputs;  // of a step

 public:
  explicit Placing(const ConvDweight& op)
      : op_(op),
        x_(static_cast<const T*>(op.x)),
        dy_(static_cast<const T*>(op.dy)),
        flat_(op.inputs < kPanel),
        across_(flat_ ? op.columns.kernel : 1),
        values_(across_ * op.inputs),
        pixels_(op.images * op.rows.outputs * op.columns.outputs) {}

  int64_t steps() const { return ceil_div(pixels_, kPixels); }
  int64_t window() const { return op_.rows.kernel * op_.columns.kernel * op_.inputs; }
  int64_t points() const { return flat_ ? 1 : op_.rows.kernel * op_.columns.kernel; }
  int64_t channels() const { return window() / points(); }

  // Room for so many steps.
  struct Operands {
    Panels<V> x, dy;
    const T* zeros;
  };
  Operands operands(int64_t steps, Arena& arena) const {
    Operands to{{channels(), steps, flat_, nullptr}, {op_.outputs, steps, false, nullptr}, nullptr};
    to.x.begin = arena.take<V>(points() * to.x.point());
    to.dy.begin = arena.take<V>(to.dy.point());
    const int64_t most = maximum(values_, op_.outputs);
    auto* const zeros = arena.take<T>(most);
    for (int64_t i = 0; i < most; ++i) zeros[i] = {};
    to.zeros = zeros;
    return to;
  }

  // Steps [begin, end) of those from `first` on. The last one of all may have pixels that aren't there.
  void place(const Operands& to, int64_t first, int64_t begin, int64_t end) const {
    Arena arena;
    T* const copies = flat_ ? arena.take<T>(kPixels * values_) : nullptr;
    int64_t pixel = kPixels * (first + begin);
    Pixel next = pixel_at(pixel);
    for (int64_t step = begin; step < end; ++step) {
      const T* from[kPixels];
      Window windows[kPixels];
      for (int64_t i = 0; i < kPixels; ++i, ++pixel, next = after(next)) {
        from[i] = pixel < pixels_ ? dy_ + pixel * op_.outputs : to.zeros;
        windows[i] = window_of(next);
      }
      place_step(from, op_.outputs, to.dy.at(0, 0, step), to.dy.panel());
      V* at = to.x.at(0, 0, step);
      for (int64_t i = 0; i < op_.rows.kernel; ++i)
        for (int64_t j = 0; j < op_.columns.kernel;
             j += across_, at += flat_ ? kPixels * values_ : to.x.point()) {
          for (int64_t k = 0; k < kPixels; ++k)
            from[k] = tap(windows[k], i, j, to.zeros, copies + k * values_);
          place_step(from, values_, at, to.x.panel());
        }
    }
  }

  // What `steps` from `first` on read for the first time: the last taps of their windows. Where windows leave
  // gaps, it is too little of what lies there.
  Ahead<T> ahead(int64_t first, int64_t steps, int64_t slices) const {
    const int64_t begin = minimum(kPixels * first, pixels_ - 1);
    const int64_t end = minimum(kPixels * (first + steps), pixels_);
    const bool gaps = op_.rows.kernel < op_.rows.stride;
    const T* const x = last_tap(begin);
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

  const T* image(int64_t index) const { return x_ + index * op_.rows.size * op_.columns.size * op_.inputs; }

  const T* last_tap(int64_t pixel) const {
    auto inside = [](const ConvAxis& axis, int64_t o) {
      return minimum(maximum<int64_t>(0, axis.place(o, axis.kernel - 1)), axis.size - 1);
    };
    const Pixel at = pixel_at(pixel);
    const int64_t row = inside(op_.rows, at.row), column = inside(op_.columns, at.column);
    return image(at.image) + (row * op_.columns.size + column) * op_.inputs;
  }

  struct Window {
    const T* image;       // null: a pixel that isn't there
    int64_t row, column;  // where it begins
    bool whole;           // inside x, each tap in one piece
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
  FUSEDRES_INLINE const T* tap(const Window& window, int64_t i, int64_t j, const T* zeros, T* copy) const {
    const ConvAxis &rows = op_.rows, &columns = op_.columns;
    const int64_t row = window.row + i * rows.dilation, column = window.column + j * columns.dilation;
    if (window.whole) return window.image + (row * columns.size + column) * op_.inputs;
    if (!window.image || !rows.inside(row)) return zeros;
    const T* const x_row = window.image + row * columns.size * op_.inputs;
    if (!flat_) return columns.inside(column) ? x_row + column * op_.inputs : zeros;
    copy_row(x_row, column, copy);
    return copy;
  }
  void copy_row(const T* x_row, int64_t column, T* to) const {
    for (int64_t j = 0; j < across_; ++j, column += op_.columns.dilation)
      for (int64_t i = 0; i < op_.inputs; ++i, ++to)
        *to = op_.columns.inside(column) ? x_row[column * op_.inputs + i] : T{};
  }

  // Each channel's values of a step's pixels side by side, in panels. What fills up the last panel is
  // multiplied, and not stored.
  FUSEDRES_INLINE static void place_step(const T* const* from, int64_t count, V* to, int64_t panel) {
    constexpr int64_t kLanes = Vec<float>::kLanes;
    auto place = [&](int64_t i, auto lanes) FUSEDRES_INLINE_LAMBDA {
      store(reinterpret_cast<float*>(to + i % kPanel * kPixels), side_by_side(from, i, lanes), lanes);
    };
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes, to += i % kPanel ? 0 : panel) place(i, AllLanes{});
    if (i < count) place(i, FirstLanes{static_cast<int>(count - i)});
  }

  template <class Lanes>
  FUSEDRES_INLINE static Vec<float> side_by_side(const T* const* from, int64_t i, Lanes lanes) {
    const Vec<float> one = load(from[0] + i, lanes);
    if constexpr (kPixels == 1) {
      return one;
    } else {
      const Words low = bit_cast<Words>(one.v) >> 16;
      return {bit_cast<Vec<float>::Native>(low | bit_cast<Words>(load(from[1] + i, lanes).v))};
    }
  }

  const ConvDweight& op_;
  const T* const x_;
  const T* const dy_;
  const bool flat_;
  const int64_t across_;  // columns of a tap
  const int64_t values_;  // of a tap
  const int64_t pixels_;
};

}  // namespace fusedres::FUSEDRES_ISA

#include "passes.h"
#include "pool.h"

namespace fusedres::FUSEDRES_ISA {
namespace {

// The largest value so far of a vector of windows, and its position: the first of equal values, but the last
// NaN, as in eager.
template <class A>
struct Largest {
  Vec<A> value;
  Vec<A> position;

  FUSEDRES_INLINE void compare(Vec<A> v, Vec<A> at) {
    const Condition<A> wins = (v > value) | (v != v);
    value = select(wins, v, value);
    position = select(wins, at, position);
  }
};

template <class A>
FUSEDRES_INLINE Vec<A> number(int64_t n) {
  return splat<Vec<A>>(static_cast<double>(n));
}

template <class A>
FUSEDRES_INLINE Vec<A> lowest() {
  return broadcast(-static_cast<A>(__builtin_inf()));
}

// y and choice of a vector of windows. ReLU comes after the comparison: it changes the position only where it
// is flat, and nothing passes there.
template <class T, bool kRelu, class Lanes>
FUSEDRES_INLINE void finish(const PoolApply& pass, Largest<Accumulation<T>> largest, int64_t element,
                            Lanes lanes) {
  using V = VecOf<T>;
  if constexpr (kRelu) {
    const V zero{};
    largest.position =
        select(largest.value <= zero, number<Accumulation<T>>(kPassesNothing), largest.position);
    largest.value = Relu::value(largest.value);
  }
  store(static_cast<T*>(pass.y) + element, largest.value, lanes);
  if (pass.choice) store_bytes(pass.choice + element, largest.position, lanes);
}

template <class T>
struct Tables {
  using A = Accumulation<T>;
  const A* mean;
  const A* scale;
  const A* shift;

  explicit Tables(const Affine& affine)
      : mean(static_cast<const A*>(affine.mean)),
        scale(static_cast<const A*>(affine.scale)),
        shift(static_cast<const A*>(affine.shift)) {}
};

template <class T, bool kRelu>
void pool_pixels(const PoolApply& pass) {
  using A = Accumulation<T>;
  using V = Vec<A>;
  const PoolAxis rows = pass.pool.rows, columns = pass.pool.columns;
  const int64_t channels = pass.shape.channels, row_elements = columns.size * channels;
  const T* const x = static_cast<const T*>(pass.x);
  const Tables<T> table(pass.x_affine);
  parallel(pass.shape.images * rows.outputs, rows.stride * row_elements, [&](int64_t begin, int64_t end) {
    for (int64_t out_row = begin; out_row < end; ++out_row) {
      const int64_t image = out_row / rows.outputs, top = rows.start(out_row % rows.outputs);
      const PoolAxis::Range h = rows.inside(out_row % rows.outputs);
      const T* const plane = x + image * rows.size * row_elements;
      for (int64_t o = 0; o < columns.outputs; ++o) {
        const int64_t left = columns.start(o);
        const PoolAxis::Range w = columns.inside(o);
        along_channels<A>(
            pass.shape, out_row * columns.outputs + o, 0, channels, 0,
            [&](const Place& at, auto lanes) FUSEDRES_INLINE_LAMBDA {
              const V mean = load(table.mean + at.channel, lanes),
                      scale = load(table.scale + at.channel, lanes),
                      shift = load(table.shift + at.channel, lanes);
              Largest<A> largest{lowest<A>(), number<A>((h.begin - top) * columns.kernel + w.begin - left)};
              for (int64_t row = h.begin; row < h.end; ++row)
                for (int64_t column = w.begin; column < w.end; ++column) {
                  const T* const p = plane + row * row_elements + column * channels + at.channel;
                  largest.compare(rounded<T>(affine(load(p, lanes), mean, scale, shift)),
                                  number<A>((row - top) * columns.kernel + column - left));
                }
              finish<T, kRelu>(pass, largest, at.element, lanes);
            });
      }
    }
  });
}

// Scratch for windows of one row of a plane.
template <class A>
struct RowScratch {
  static constexpr int64_t kSize = kSegment + Vec<A>::kLanes;
  A normalised[kSize];  // of a row of x
  A value[kSize];       // of each window: the largest so far, and its position
  A position[kSize];
};

// to = act(BN(x)) of columns [begin, end) of one row of a plane, rounded to T.
template <class T>
void normalise_row(const T* x, int64_t begin, int64_t end, const Tables<T>& table, int64_t c,
                   Accumulation<T>* to) {
  using V = VecOf<T>;
  const V mean = broadcast(table.mean[c]), scale = broadcast(table.scale[c]),
          shift = broadcast(table.shift[c]);
  along_row<Accumulation<T>>(begin, end, [&](int64_t column, auto lanes) FUSEDRES_INLINE_LAMBDA {
    store(to + (column - begin), rounded<T>(affine(load(x + column, lanes), mean, scale, shift)));
  });
}

// Compares position k of windows [first, last) with the largest so far; `from` is the column of
// normalised[0].
template <class A>
void compare_row(const PoolAxis& columns, int64_t first, int64_t last, int64_t k, int64_t from, A at,
                 RowScratch<A>& row) {
  const int64_t begin = maximum(first, ceil_div(maximum<int64_t>(0, columns.padding - k), columns.stride));
  const int64_t end = minimum(last, ceil_div(columns.size + columns.padding - k, columns.stride));
  const A* p = row.normalised + (columns.start(begin) + k - from);
  for (int64_t o = begin; o < end; ++o, p += columns.stride) {
    const A v = *p, largest = row.value[o - first];
    const bool wins = v > largest || v != v;
    row.value[o - first] = wins ? v : largest;
    row.position[o - first] = wins ? at : row.position[o - first];
  }
}

// Windows [first, last) of one row of y.
template <class T, bool kRelu>
void pool_windows(const PoolApply& pass, int64_t out_row, int64_t first, int64_t last,
                  RowScratch<Accumulation<T>>& scratch) {
  using A = Accumulation<T>;
  const PoolAxis rows = pass.pool.rows, columns = pass.pool.columns;
  const int64_t plane = out_row / rows.outputs, top = rows.start(out_row % rows.outputs);
  const PoolAxis::Range h = rows.inside(out_row % rows.outputs);
  const int64_t from = columns.inside(first).begin, to = columns.inside(last - 1).end;
  for (int64_t o = first; o < last; ++o) {
    const int64_t column = columns.inside(o).begin - columns.start(o);
    scratch.value[o - first] = lowest<A>().v[0];
    scratch.position[o - first] = static_cast<A>((h.begin - top) * columns.kernel + column);
  }
  for (int64_t row = h.begin; row < h.end; ++row) {
    const T* const x = static_cast<const T*>(pass.x) + (plane * rows.size + row) * columns.size;
    normalise_row(x, from, to, Tables<T>(pass.x_affine), plane % pass.shape.channels, scratch.normalised);
    for (int64_t k = 0; k < columns.kernel; ++k)
      compare_row(columns, first, last, k, from, static_cast<A>((row - top) * columns.kernel + k), scratch);
  }
  along_row<A>(first, last, [&](int64_t o, auto lanes) FUSEDRES_INLINE_LAMBDA {
    const Largest<A> largest{load(scratch.value + (o - first), lanes),
                             load(scratch.position + (o - first), lanes)};
    finish<T, kRelu>(pass, largest, out_row * columns.outputs + o, lanes);
  });
}

template <class T, bool kRelu>
void pool_planes(const PoolApply& pass) {
  const PoolAxis rows = pass.pool.rows, columns = pass.pool.columns;
  const int64_t outputs = (kSegment - columns.kernel) / columns.stride + 1;  // of a segment
  const int64_t planes = pass.shape.images * pass.shape.channels;
  parallel(planes * rows.outputs, rows.stride * columns.size, [&](int64_t begin, int64_t end) {
    RowScratch<Accumulation<T>> scratch;
    for (int64_t out_row = begin; out_row < end; ++out_row)
      for (int64_t first = 0; first < columns.outputs; first += outputs)
        pool_windows<T, kRelu>(pass, out_row, first, minimum(first + outputs, columns.outputs), scratch);
  });
}

template <class T, bool kRelu>
void pool_order(const PoolApply& pass) {
  if (pass.shape.order == Order::kPixels) return pool_pixels<T, kRelu>(pass);
  pool_planes<T, kRelu>(pass);
}

}  // namespace

void pool_apply(const PoolApply& pass) {
  with_type(pass.dtype, [&](auto element) {
    using T = decltype(element);
    if (pass.act == Act::kRelu) return pool_order<T, true>(pass);
    pool_order<T, false>(pass);
  });
}

}  // namespace fusedres::FUSEDRES_ISA

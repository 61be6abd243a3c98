#include "passes.h"
#include "pool.h"
#include "reduce.h"

namespace fusedres::FUSEDRES_ISA {
namespace {

// One bit a lane, set where the byte is `value`.
template <class A>
FUSEDRES_INLINE unsigned bits_equal(const uint8_t* p, uint8_t value, AllLanes) {
  constexpr int kLanes = Vec<A>::kLanes;
#if defined(__AVX512F__)
  if constexpr (kLanes == 16)
    return _mm_cmpeq_epi8_mask(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)),
                               _mm_set1_epi8(static_cast<char>(value)));
#endif
#if defined(__AVX2__)
  if constexpr (kLanes == 8) {
    int64_t bytes;
    __builtin_memcpy(&bytes, p, sizeof bytes);
    const __m128i same = _mm_cmpeq_epi8(_mm_cvtsi64_si128(bytes), _mm_set1_epi8(static_cast<char>(value)));
    return static_cast<unsigned>(_mm_movemask_epi8(same)) & 0xff;
  }
#endif
  unsigned bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) bits |= unsigned{p[lane] == value} << lane;
  return bits;
}
template <class A>
FUSEDRES_INLINE unsigned bits_equal(const uint8_t* p, uint8_t value, FirstLanes lanes) {
  unsigned bits = 0;
  for (int lane = 0; lane < lanes.count; ++lane) bits |= unsigned{p[lane] == value} << lane;
  return bits;
}

// The windows that cover a pixel, where a pixel's channels lie together.
template <class T>
class Covering {
 public:
  Covering(const Shape& shape, const Slope& slope, Arena& arena)
      : channels_(shape.channels),
        rows_(slope.pool.rows),
        columns_(slope.pool.columns),
        choice_(slope.choice),
        dy_(static_cast<const T*>(slope.dy)),
        of_column_(arena.take<PoolAxis::Range>(columns_.size)) {
    for (int64_t column = 0; column < columns_.size; ++column)
      of_column_[column] = columns_.covering(column, column + 1);
  }

  void move_to(int64_t pixel) {
    if (pixel < row_begin_ || pixel >= row_begin_ + columns_.size) move_to_row(pixel / columns_.size);
    const int64_t column = pixel - row_begin_;
    count_ = 0;
    for (int64_t i = of_row_.begin; i < of_row_.end; ++i)
      for (int64_t j = of_column_[column].begin; j < of_column_[column].end; ++j) {
        const int64_t window = ((image_ * rows_.outputs + i) * columns_.outputs + j) * channels_;
        const int64_t position = (row_ - rows_.start(i)) * columns_.kernel + column - columns_.start(j);
        windows_[count_++] = {choice_ + window, dy_ + window, static_cast<uint8_t>(position)};
      }
  }

  // What comes back to a vector of the pixel's channels.
  template <class Lanes>
  FUSEDRES_INLINE Vec<Accumulation<T>> gradient(int64_t channel, Lanes lanes) const {
    using A = Accumulation<T>;
    Vec<A> g{};
    for (int i = 0; i < count_; ++i) {
      const Window& window = windows_[i];
      const unsigned chosen = bits_equal<A>(window.choice + channel, window.position, lanes);
      g = g + keep(chosen, load(window.dy + channel, lanes));
    }
    return g;
  }

 private:
  struct Window {
    const uint8_t* choice;
    const T* dy;
    uint8_t position;  // that this pixel has in it
  };

  void move_to_row(int64_t row) {
    row_begin_ = row * columns_.size;
    image_ = row / rows_.size;
    row_ = row % rows_.size;
    of_row_ = rows_.covering(row_, row_ + 1);
  }

  const int64_t channels_;
  const PoolAxis rows_, columns_;
  const uint8_t* const choice_;
  const T* const dy_;
  PoolAxis::Range* const of_column_;
  PoolAxis::Range of_row_{};
  int64_t row_begin_ = -columns_.size, image_ = 0, row_ = 0;
  int count_ = 0;
  Window windows_[kPassesNothing];
};

// g of columns [begin, end) of one row of a plane.
template <class T>
void gather(const Slope& slope, int64_t plane, int64_t row, int64_t begin, int64_t end, Accumulation<T>* g) {
  using A = Accumulation<T>;
  const PoolAxis &rows = slope.pool.rows, &columns = slope.pool.columns;
  const PoolAxis::Range h = rows.covering(row, row + 1), w = columns.covering(begin, end);
  for (int64_t column = begin; column < end; ++column) g[column - begin] = 0;
  for (int64_t i = h.begin; i < h.end; ++i) {
    const int64_t windows = (plane * rows.outputs + i) * columns.outputs;
    const int64_t first_position = (row - rows.start(i)) * columns.kernel;
    for (int64_t j = w.begin; j < w.end; ++j) {
      const int64_t in_row = slope.choice[windows + j] - first_position, column = columns.start(j) + in_row;
      if (in_row < 0 || in_row >= columns.kernel || column < begin || column >= end) continue;
      g[column - begin] += static_cast<A>(widen(static_cast<const T*>(slope.dy)[windows + j]));
    }
  }
}

// body(place, lanes, g) for every vector of columns [begin, end) of one row of a plane.
template <class T, class Body>
FUSEDRES_INLINE void along_segment(const Shape& shape, const Slope& slope, int64_t plane, int64_t row,
                                   int64_t begin, int64_t end, const Body& body) {
  using A = Accumulation<T>;
  A g[kSegment];
  gather<T>(slope, plane, row, begin, end, g);
  const int64_t first_element = plane * shape.pixels + row * slope.pool.columns.size;
  along_row<A>(begin, end, [&](int64_t column, auto lanes) FUSEDRES_INLINE_LAMBDA {
    const Place at{first_element + column, 0, plane % shape.channels, 0, 0};
    body(at, lanes, load(g + (column - begin), lanes));
  });
}

// The terms of one vector: g, and with kSums = 2 its product with x.
template <class T, Order kOrder>
struct Terms {
  using A = Accumulation<T>;
  const T* x;
  const A* mean;

  explicit Terms(const Slope& slope)
      : x(static_cast<const T*>(slope.x)), mean(static_cast<const A*>(slope.x_affine.mean)) {}

  template <int kSums, class Lanes>
  FUSEDRES_INLINE void add(const Place& at, Lanes lanes, Vec<A> g, Vec<A> (&sums)[kSums]) const {
    sums[0] = sums[0] + g;
    if constexpr (kSums == 2)
      sums[1] = sums[1] + g * (load(x + at.element, lanes) - per_channel<kOrder>(mean, at, lanes));
  }
};

// totals[k][c] += the sum of the k-th term over pixels [begin, end), in runs of float, for at most
// kChannelTile channels.
template <class T, int kSums>
void sum_pixels(const Shape& shape, const Slope& slope, Parts::Range pixels, int64_t first, int64_t last,
                double* const (&totals)[kSums]) {
  using A = Accumulation<T>;
  const Terms<T, Order::kPixels> terms(slope);
  Arena arena;
  Covering<T> covering(shape, slope, arena);
  A runs[kSums][kChannelTile + Vec<A>::kLanes];
  for (int64_t run = pixels.begin; run < pixels.end; run += kRun) {
    for (int k = 0; k < kSums; ++k)
      for (int64_t c = 0; c < kChannelTile; ++c) runs[k][c] = 0;
    auto add = [&](const Place& at, auto lanes) FUSEDRES_INLINE_LAMBDA {
      const Vec<A> g = covering.gradient(at.channel, lanes);
      Vec<A> sums[kSums];
      for (int k = 0; k < kSums; ++k) sums[k] = load(runs[k] + (at.channel - first), lanes);
      terms.add(at, lanes, g, sums);
      for (int k = 0; k < kSums; ++k) store(runs[k] + (at.channel - first), sums[k], lanes);
    };
    for (int64_t pixel = run; pixel < minimum(run + kRun, pixels.end); ++pixel) {
      covering.move_to(pixel);
      along_channels<A>(shape, pixel, first, last, 0, add);
    }
    for (int k = 0; k < kSums; ++k)
      for (int64_t c = first; c < last; ++c) totals[k][c] += runs[k][c - first];
  }
}

// The same over images [begin, end) of planes.
template <class T, int kSums>
void sum_planes(const Shape& shape, const Slope& slope, Parts::Range images, int64_t first, int64_t last,
                double* const (&totals)[kSums]) {
  using A = Accumulation<T>;
  const Terms<T, Order::kPlanes> terms(slope);
  const int64_t rows = slope.pool.rows.size, columns = slope.pool.columns.size;
  for (int64_t image = images.begin; image < images.end; ++image)
    for (int64_t c = first; c < last; ++c)
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t begin = 0; begin < columns; begin += kSegment) {
          Vec<A> sums[kSums] = {};
          auto add = [&](const Place& at, auto lanes, Vec<A> g)
                         FUSEDRES_INLINE_LAMBDA { terms.add(at, lanes, g, sums); };
          along_segment<T>(shape, slope, image * shape.channels + c, row, begin,
                           minimum(begin + kSegment, columns), add);
          for (int k = 0; k < kSums; ++k) totals[k][c] += sum_lanes(sums[k]);
        }
}

template <class T, Order kOrder, int kSums>
void sums_pass(const GradientSums& pass) {
  const Shape shape = pass.shape;
  for_each_part<kOrder>(shape, pass.parts, [&](int64_t part, int64_t first, int64_t last) {
    double* const all[] = {pass.g, pass.g_x};
    double* totals[kSums];
    for (int k = 0; k < kSums; ++k) {
      totals[k] = all[k] + part * shape.channels;
      for (int64_t c = first; c < last; ++c) totals[k][c] = 0;
    }
    const Parts::Range range = pass.parts.range(part);
    if constexpr (kOrder == Order::kPixels)
      for (int64_t c = first; c < last; c += kChannelTile)
        sum_pixels<T>(shape, pass.slope, range, c, minimum(c + kChannelTile, last), totals);
    else
      sum_planes<T>(shape, pass.slope, range, first, last, totals);
  });
}

template <class T, Order kOrder>
void gradient_pass(const GradientApply& pass) {
  using A = Accumulation<T>;
  const Shape shape = pass.shape;
  const Slope slope = pass.slope;
  const OperandGradient to = pass.x;
  const T* const x = static_cast<const T*>(slope.x);
  auto body = [=](const Place& at, auto lanes, Vec<A> g) FUSEDRES_INLINE_LAMBDA {
    auto constants = [&](const void* table) FUSEDRES_INLINE_LAMBDA {
      return per_channel<kOrder>(static_cast<const A*>(table), at, lanes);
    };
    Vec<A> dx = constants(to.a) * g;
    if (to.b)
      dx = norm_gradient(g, load(x + at.element, lanes), constants(slope.x_affine.mean), constants(to.a),
                         constants(to.b), constants(to.d));
    store(static_cast<T*>(to.gradient) + at.element, dx, lanes);
  };
  if constexpr (kOrder == Order::kPixels) {
    parallel(shape.rows(), shape.channels, [&](int64_t begin, int64_t end) {
      Arena arena;
      Covering<T> covering(shape, slope, arena);
      auto write = [&](const Place& at, auto lanes)
                       FUSEDRES_INLINE_LAMBDA { body(at, lanes, covering.gradient(at.channel, lanes)); };
      for (int64_t pixel = end; pixel-- > begin;) {
        covering.move_to(pixel);
        along_channels<A>(shape, pixel, 0, shape.channels, 0, write);
      }
    });
  } else {
    const int64_t rows = slope.pool.rows.size, columns = slope.pool.columns.size;
    parallel(shape.images * shape.channels * rows, columns, [&](int64_t first, int64_t last) {
      for (int64_t row = last; row-- > first;)
        for (int64_t begin = 0; begin < columns; begin += kSegment)
          along_segment<T>(shape, slope, row / rows, row % rows, begin, minimum(begin + kSegment, columns),
                           body);
    });
  }
}

}  // namespace

void pool_gradient_sums(const GradientSums& pass) {
  with_type(pass.dtype, [&](auto element) {
    with_order(pass.shape.order, [&](auto order) {
      constexpr Order kOrder = decltype(order)::kOrder;
      if (pass.g_x) return sums_pass<decltype(element), kOrder, 2>(pass);
      sums_pass<decltype(element), kOrder, 1>(pass);
    });
  });
}

void pool_gradient_apply(const GradientApply& pass) {
  with_type(pass.dtype, [&](auto element) {
    with_order(pass.shape.order,
               [&](auto order) { gradient_pass<decltype(element), decltype(order)::kOrder>(pass); });
  });
}

}  // namespace fusedres::FUSEDRES_ISA

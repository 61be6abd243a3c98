#include "passes.h"
#include "pool.h"
#include "reduce.h"

namespace fusedres::FUSEDRES_ISA {
namespace {

// body(place, lanes, g) for every vector of channels [first, last) of one pixel.
template <class T, class Body>
FUSEDRES_INLINE void along_pixel(const Shape& shape, const Slope& slope, int64_t pixel, int64_t first,
                                 int64_t last, const Body& body) {
  using A = Accumulation<T>;
  using V = Vec<A>;
  const PoolAxis &rows = slope.pool.rows, &columns = slope.pool.columns;
  const int64_t image = pixel / shape.pixels, row = pixel % shape.pixels / columns.size,
                column = pixel % columns.size;
  const PoolAxis::Range h = rows.covering(row, row + 1), w = columns.covering(column, column + 1);
  along_channels<A>(shape, pixel, first, last, 0, [&](const Place& at, auto lanes) FUSEDRES_INLINE_LAMBDA {
    V g{};
    for (int64_t i = h.begin; i < h.end; ++i)
      for (int64_t j = w.begin; j < w.end; ++j) {
        const int64_t window = (image * rows.outputs + i) * columns.outputs + j;
        const int64_t position = (row - rows.start(i)) * columns.kernel + column - columns.start(j);
        const int64_t element = window * shape.channels + at.channel;
        const V choice = load_bytes<A>(slope.choice + element, lanes);
        const V dy = load(static_cast<const T*>(slope.dy) + element, lanes);
        g = g + select(choice != splat<V>(static_cast<double>(position)), V{}, dy);
      }
    body(at, lanes, g);
  });
}

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
    const Place at{first_element + column, 0, plane % shape.channels, 0};
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

// totals[k][c] += the sum of the k-th term over pixels [begin, end), in runs of float.
template <class T, int kSums>
void sum_pixels(const Shape& shape, const Slope& slope, Parts::Range pixels, int64_t first, int64_t last,
                double* const (&totals)[kSums]) {
  using A = Accumulation<T>;
  const Terms<T, Order::kPixels> terms(slope);
  A runs[kSums][kChannelTile + Vec<A>::kLanes];
  for (int64_t run = pixels.begin; run < pixels.end; run += kRun) {
    for (int k = 0; k < kSums; ++k)
      for (int64_t c = 0; c < kChannelTile; ++c) runs[k][c] = 0;
    auto add = [&](const Place& at, auto lanes, Vec<A> g) FUSEDRES_INLINE_LAMBDA {
      Vec<A> sums[kSums];
      for (int k = 0; k < kSums; ++k) sums[k] = load(runs[k] + (at.channel - first), lanes);
      terms.add(at, lanes, g, sums);
      for (int k = 0; k < kSums; ++k) store(runs[k] + (at.channel - first), sums[k], lanes);
    };
    for (int64_t pixel = run; pixel < minimum(run + kRun, pixels.end); ++pixel)
      along_pixel<T>(shape, slope, pixel, first, last, add);
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
      sum_pixels<T>(shape, pass.slope, range, first, last, totals);
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
      for (int64_t pixel = end; pixel-- > begin;)
        along_pixel<T>(shape, slope, pixel, 0, shape.channels, body);
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

#include "passes.h"
#include "reduce.h"

namespace fusedres::FUSEDRES_ISA {
namespace {

// A value near the channel's values in a part, so that squares of differences do not cancel: the mean of a
// few. 0 where they are not finite: an infinity must reach the sums as itself.
template <class T, Order kOrder>
void find_pivots(const Shape& shape, const T* x, Parts::Range range, int64_t first, int64_t last,
                 Accumulation<T>* pivot) {
  using A = Accumulation<T>;
  constexpr bool kPixels = kOrder == Order::kPixels;
  const int64_t count = minimum<int64_t>(8, kPixels ? range.end - range.begin : shape.pixels);
  for (int64_t c = first; c < last; ++c) {
    const T* const values =
        x + (kPixels ? range.begin * shape.channels + c : (range.begin * shape.channels + c) * shape.pixels);
    const int64_t stride = kPixels ? shape.channels : 1;
    A sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += widen(values[i * stride]);
    pivot[c] = __builtin_isfinite(sum) ? sum / static_cast<A>(count) : A{0};
  }
}

template <class T, Order kOrder>
void statistics_pass(const PartStatistics& pass) {
  using A = Accumulation<T>;
  const Shape& shape = pass.shape;
  const T* const x = static_cast<const T*>(pass.x);
  for_each_part<kOrder>(shape, pass.parts, [&](int64_t part, int64_t first, int64_t last) {
    const Parts::Range range = pass.parts.range(part);
    A* const pivot = static_cast<A*>(pass.pivot) + part * shape.channels;
    double* const sums[] = {pass.mean + part * shape.channels, pass.m2 + part * shape.channels};
    find_pivots<T, kOrder>(shape, x, range, first, last, pivot);
    for (double* sum : sums)
      for (int64_t c = first; c < last; ++c) sum[c] = 0;

    auto add = [=](const Place& at, auto lanes, Vec<A>(&sum)[2]) FUSEDRES_INLINE_LAMBDA {
      const Vec<A> difference = load(x + at.element, lanes) - per_channel<kOrder>(pivot, at, lanes);
      const Vec<A> d = within(difference, lanes);
      sum[0] = sum[0] + d;
      sum[1] = sum[1] + d * d;
    };
    int64_t values = range.end - range.begin;
    if constexpr (kOrder == Order::kPixels) {
      reduce_pixels<A, true>(shape, range, first, last, 0, sums, add);
    } else {
      reduce_planes<A, true>(shape, range, first, last, 0, sums, add);
      values *= shape.pixels;
    }
    const double share = 1.0 / static_cast<double>(values);
    for (int64_t c = first; c < last; ++c) {
      const double mean = sums[0][c] * share;
      sums[1][c] -= sums[0][c] * mean;
      sums[0][c] = mean + pivot[c];
    }
  });
}

}  // namespace

void part_statistics(const PartStatistics& pass) {
  with_type(pass.dtype, [&](auto element) {
    with_order(pass.shape.order,
               [&](auto order) { statistics_pass<decltype(element), decltype(order)::kOrder>(pass); });
  });
}

}  // namespace fusedres::FUSEDRES_ISA

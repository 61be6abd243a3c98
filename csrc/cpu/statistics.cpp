#include "passes.h"
#include "reduce.h"

namespace fusedres::FUSEDRES_ISA {
namespace {

// A value near the channel's values in a part, so that squares of differences do not cancel: the mean of a
// few. 0 where they are not finite: an infinity must reach the sums as itself.
constexpr int64_t kPivotValues = 8;

// Whether squares need no pivot to be added up in float. Of bfloat16 they have 16 bits, and 32 of them of
// like size 21: where the sum's square would be subtracted from about itself, they are added without an
// error. Not beyond 1e19.
template <class T>
constexpr bool kSquaresAddUp = false;
template <>
constexpr bool kSquaresAddUp<BFloat16> = true;

struct Shifted {
  static constexpr bool kShifted = true;
};
struct Unshifted {
  static constexpr bool kShifted = false;
};

FUSEDRES_INLINE bool all_finite(const double* values, int64_t count) {
  int64_t others = 0;  // whole numbers, which the compiler adds up in any order
  for (int64_t i = 0; i < count; ++i) others += !(values[i] - values[i] == 0);
  return others == 0;
}

template <class A>
FUSEDRES_INLINE Vec<A> finite_or_zero(Vec<A> v) {
  return select(v - v <= Vec<A>{}, v, Vec<A>{});
}

template <class T>
void find_pixel_pivots(const Shape& shape, const T* x, Parts::Range rows, int64_t first, int64_t last,
                       Accumulation<T>* pivot) {
  using A = Accumulation<T>;
  const int64_t count = minimum(kPivotValues, rows.end - rows.begin);
  along_channels<A>(
      shape, rows.begin, first, last, 0, [&](const Place& at, auto lanes) FUSEDRES_INLINE_LAMBDA {
        Vec<A> sum{};
        for (int64_t row = 0; row < count; ++row)
          sum = sum + load(x + at.element + row * shape.channels, lanes);
        store(pivot + at.channel, finite_or_zero(sum / splat<Vec<A>>(static_cast<double>(count))), lanes);
      });
}

template <class T>
void find_plane_pivots(const Shape& shape, const T* x, Parts::Range images, int64_t first, int64_t last,
                       Accumulation<T>* pivot) {
  using A = Accumulation<T>;
  const int64_t count = minimum(kPivotValues, shape.pixels);
  for (int64_t c = first; c < last; ++c) {
    const T* const plane = x + (images.begin * shape.channels + c) * shape.pixels;
    A sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += widen(plane[i]);
    pivot[c] = __builtin_isfinite(sum) ? sum / static_cast<A>(count) : A{0};
  }
}

template <class T, Order kOrder>
void statistics_pass(const PartStatistics& pass) {
  using A = Accumulation<T>;
  const Shape shape = pass.shape;
  const T* const x = static_cast<const T*>(pass.x);
  for_each_part<kOrder>(shape, pass.parts, [&](int64_t part, int64_t first, int64_t last) {
    const Parts::Range range = pass.parts.range(part);
    A* const pivot = static_cast<A*>(pass.pivot) + part * shape.channels;
    double* const sums[] = {pass.mean + part * shape.channels, pass.m2 + part * shape.channels};
    auto sum = [&](auto shift) {
      constexpr bool kShifted = decltype(shift)::kShifted;
      if constexpr (!kShifted)
        for (int64_t c = first; c < last; ++c) pivot[c] = 0;
      else if constexpr (kOrder == Order::kPixels)
        find_pixel_pivots(shape, x, range, first, last, pivot);
      else
        find_plane_pivots(shape, x, range, first, last, pivot);
      for (double* total : sums)
        for (int64_t c = first; c < last; ++c) total[c] = 0;
      auto add = [=](const Place& at, auto lanes, Vec<A>(&terms)[2]) FUSEDRES_INLINE_LAMBDA {
        prefetch_ahead<kOrder>(x, at);
        Vec<A> d = load(x + at.element, lanes);
        if constexpr (kShifted) d = within(d - per_channel<kOrder>(pivot, at, lanes), lanes);
        terms[0] = terms[0] + d;
        terms[1] = terms[1] + d * d;
      };
      if constexpr (kOrder == Order::kPixels)
        reduce_pixels<A, true>(shape, range, first, last, 0, sums, add);
      else
        reduce_planes<A, true>(shape, range, first, last, 0, sums, add);
    };
    if constexpr (kSquaresAddUp<T>) {
      sum(Unshifted{});
      if (!all_finite(sums[1] + first, last - first)) sum(Shifted{});
    } else {
      sum(Shifted{});
    }
    const int64_t pixels = kOrder == Order::kPixels ? 1 : shape.pixels;
    const double share = 1.0 / static_cast<double>((range.end - range.begin) * pixels);
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

#include "reduce.h"
#include "slope.h"

namespace fusedres::FUSEDRES_ISA {
namespace {

// kSums: 1 for g alone, 2 with x's products, 3 with r's as well. Where only r's are wanted, x stands for r.
template <class T, Order kOrder, SlopeKind kKind, int kSums>
void sums_pass(const GradientSums& pass, const void* second, const void* second_mean, double* second_sums) {
  using A = Accumulation<T>;
  const Shape shape = pass.shape;
  const Slope slope = pass.slope;
  constexpr bool kShort = kKind != SlopeKind::kAny;
  const T* const operands[] = {static_cast<const T*>(second), static_cast<const T*>(slope.r)};
  const A* const means[] = {static_cast<const A*>(second_mean), static_cast<const A*>(slope.r_affine.mean)};

  for_each_part<kOrder>(shape, pass.parts, [&](int64_t part, int64_t first, int64_t last) {
    double* const all[] = {pass.g, second_sums, pass.g_r};
    double* totals[kSums];
    for (int k = 0; k < kSums; ++k) {
      totals[k] = all[k] + part * shape.channels;
      for (int64_t c = first; c < last; ++c) totals[k][c] = 0;
    }
    auto add = [=](const Place& at, auto lanes, Vec<A>(&sum)[kSums]) FUSEDRES_INLINE_LAMBDA {
      prefetch_ahead<kOrder>(static_cast<const T*>(slope.dy), at);
      const Vec<A> g = gradient_at<T, kOrder, kKind>(slope, at, lanes);
      sum[0] = sum[0] + g;
      for (int k = 1; k < kSums; ++k) {
        prefetch_ahead<kOrder>(operands[k - 1], at);
        const Vec<A> mean = per_channel<kOrder>(means[k - 1], at, lanes);
        sum[k] = sum[k] + g * (load(operands[k - 1] + at.element, lanes) - mean);
      }
    };
    const Parts::Range range = pass.parts.range(part);
    if constexpr (kOrder == Order::kPixels)
      reduce_pixels<A, kShort>(shape, range, first, last, pass.parts.image(part) * slope.image_stride, totals,
                               add);
    else
      reduce_planes<A, kShort>(shape, range, first, last, slope.image_stride, totals, add);
  });
}

template <class T, Order kOrder, SlopeKind kKind>
void sums_of_kind(const GradientSums& pass) {
  const Slope& slope = pass.slope;
  if (pass.g_x && pass.g_r)
    return sums_pass<T, kOrder, kKind, 3>(pass, slope.x, slope.x_affine.mean, pass.g_x);
  if (pass.g_x) return sums_pass<T, kOrder, kKind, 2>(pass, slope.x, slope.x_affine.mean, pass.g_x);
  if (pass.g_r) return sums_pass<T, kOrder, kKind, 2>(pass, slope.r, slope.r_affine.mean, pass.g_r);
  sums_pass<T, kOrder, kKind, 1>(pass, nullptr, nullptr, nullptr);
}

}  // namespace

void gradient_sums(const GradientSums& pass) {
  with_type(pass.dtype, [&](auto element) {
    with_order(pass.shape.order, [&](auto order) {
      with_slope(pass.slope, [&](auto slope) {
        sums_of_kind<decltype(element), decltype(order)::kOrder, decltype(slope)::kKind>(pass);
      });
    });
  });
}

}  // namespace fusedres::FUSEDRES_ISA

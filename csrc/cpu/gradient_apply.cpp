#include "slope.h"

namespace fusedres::FUSEDRES_ISA {
namespace {

template <class T, Order kOrder, class Lanes>
FUSEDRES_INLINE void write_gradient(const OperandGradient& to, const void* operand, const void* mean,
                                    VecOf<T> g, int64_t gated, const Place& at, Lanes lanes,
                                    bool past_caches) {
  using A = Accumulation<T>;
  auto constants = [&](const void* table, int64_t offset) {
    return per_channel<kOrder>(static_cast<const A*>(table) + offset, at, lanes);
  };
  VecOf<T> gradient = g;
  if (to.b)
    gradient = norm_gradient(g, load(static_cast<const T*>(operand) + at.element, lanes), constants(mean, 0),
                             constants(to.a, gated), constants(to.b, 0), constants(to.d, 0));
  else if (to.a)
    gradient = constants(to.a, gated) * g;
  write(static_cast<T*>(to.gradient) + at.element, gradient, lanes, past_caches);
}

template <class T, Order kOrder, SlopeKind kKind>
void gradient_pass(const GradientApply& pass) {
  const Slope slope = pass.slope;
  const OperandGradient to_x = pass.x, to_r = pass.r;
  const bool x_past_caches = streams<T>(pass.shape, to_x.gradient);
  const bool r_past_caches = streams<T>(pass.shape, to_r.gradient);
  for_each_vector<Accumulation<T>, kOrder>(
      pass.shape, slope.image_stride, [=](const Place& at, auto lanes) FUSEDRES_INLINE_LAMBDA {
        const VecOf<T> g = gradient_at<T, kOrder, kKind>(slope, at, lanes);
        if (to_x.gradient)
          write_gradient<T, kOrder>(to_x, slope.x, slope.x_affine.mean, g, at.gated, at, lanes,
                                    x_past_caches);
        if (to_r.gradient)
          write_gradient<T, kOrder>(to_r, slope.r, slope.r_affine.mean, g, 0, at, lanes, r_past_caches);
      });
}

}  // namespace

void gradient_apply(const GradientApply& pass) {
  with_type(pass.dtype, [&](auto element) {
    with_order(pass.shape.order, [&](auto order) {
      with_slope(pass.slope, [&](auto slope) {
        gradient_pass<decltype(element), decltype(order)::kOrder, decltype(slope)::kKind>(pass);
      });
    });
  });
}

}  // namespace fusedres::FUSEDRES_ISA

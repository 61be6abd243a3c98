#include "slope.h"

namespace fusedres::FUSEDRES_ISA {
namespace {

template <class T, Order kOrder, class Lanes>
FUSEDRES_INLINE VecOf<T> operand_gradient(const OperandGradient& to, const T* operand, const void* mean,
                                          VecOf<T> g, int64_t gated, const Place& at, Lanes lanes) {
  using A = Accumulation<T>;
  auto constants = [&](const void* table, int64_t offset) FUSEDRES_INLINE_LAMBDA {
    return per_channel<kOrder>(static_cast<const A*>(table) + offset, at, lanes);
  };
  if (to.b) {
    prefetch_pages(operand + at.element);
    return norm_gradient(g, load(operand + at.element, lanes), constants(mean, 0), constants(to.a, gated),
                         constants(to.b, 0), constants(to.d, 0));
  }
  return to.a ? constants(to.a, gated) * g : g;
}

template <class T, Order kOrder, SlopeKind kKind>
void gradient_pass(const GradientApply& pass) {
  using V = VecOf<T>;
  const Slope slope = pass.slope;
  const OperandGradient to_x = pass.x, to_r = pass.r;
  // What is written over its operand has just been read into the caches.
  const bool x_past_caches = to_x.gradient != slope.x && streams<T>(pass.shape, to_x.gradient);
  const bool r_past_caches = to_r.gradient != slope.r && streams<T>(pass.shape, to_r.gradient);
  auto body = [=](const Place& at, auto lanes) FUSEDRES_INLINE_LAMBDA {
    prefetch_pages(static_cast<const T*>(slope.dy) + at.element);
    const V g = gradient_at<T, kOrder, kKind>(slope, at, lanes);
    if (to_x.gradient) {
      const T* const x = static_cast<const T*>(slope.x);
      const V dx = operand_gradient<T, kOrder>(to_x, x, slope.x_affine.mean, g, at.gated, at, lanes);
      write(static_cast<T*>(to_x.gradient) + at.element, dx, lanes, x_past_caches);
    }
    if (to_r.gradient) {
      const T* const r = static_cast<const T*>(slope.r);
      const V dr = operand_gradient<T, kOrder>(to_r, r, slope.r_affine.mean, g, 0, at, lanes);
      write(static_cast<T*>(to_r.gradient) + at.element, dr, lanes, r_past_caches);
    }
  };
  for_each_vector<Accumulation<T>, kOrder>(pass.shape, slope.image_stride, body);
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

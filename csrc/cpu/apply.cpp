#include "activation.h"
#include "passes.h"

namespace fusedres::FUSEDRES_ISA {
namespace {

enum class Residual { kNone, kPlain, kAffine };

// z <= this rounds to a y <= 0.
template <class T>
constexpr Accumulation<T> kRoundsToZero = 0;
template <>
constexpr float kRoundsToZero<Half> = 0x1p-25f;
template <>
constexpr float kRoundsToZero<BFloat16> = 0x1p-134f;

// Any: the one that `act` names.
enum class Kind { kIdentity, kRelu, kAny };

template <class T, Order kOrder, Residual kResidual, Kind kKind>
void apply_pass(const Apply& pass) {
  using A = Accumulation<T>;
  const T* const x = static_cast<const T*>(pass.x);
  const T* const r = static_cast<const T*>(pass.r);
  T* const y = static_cast<T*>(pass.y);
  const A* const mean = static_cast<const A*>(pass.x_affine.mean);
  const A* const scale = static_cast<const A*>(pass.x_affine.scale);
  const A* const shift = static_cast<const A*>(pass.x_affine.shift);
  const A* const mean_r = static_cast<const A*>(pass.r_affine.mean);
  const A* const scale_r = static_cast<const A*>(pass.r_affine.scale);
  const A* const shift_r = static_cast<const A*>(pass.r_affine.shift);
  uint8_t* const mask = pass.mask;
  const Act act = pass.act;
  const bool past_caches = streams<T>(pass.shape, pass.y);

  auto body = [=](const Place& at, auto lanes) FUSEDRES_INLINE_LAMBDA {
    auto constants = [&](const A* table)
                         FUSEDRES_INLINE_LAMBDA { return per_channel<kOrder>(table, at, lanes); };
    prefetch_pages(x + at.element);
    if constexpr (kResidual != Residual::kNone) prefetch_pages(r + at.element);
    Vec<A> z = affine(load(x + at.element, lanes), constants(mean), constants(scale + at.gated),
                      constants(shift + at.gated));
    if constexpr (kResidual == Residual::kPlain) z = z + load(r + at.element, lanes);
    if constexpr (kResidual == Residual::kAffine)
      z = z + affine(load(r + at.element, lanes), constants(mean_r), constants(scale_r), constants(shift_r));
    if constexpr (kKind == Kind::kAny) {
      z = activate(act, z);
    } else if constexpr (kKind == Kind::kRelu) {
      const unsigned positive = bits_above(z, kRoundsToZero<T>);
      if (mask) store_bits<A>(mask + at.mask, positive, lanes);
      z = keep(positive, z);
    }
    write(y + at.element, z, lanes, past_caches);
  };
  for_each_vector<A, kOrder>(pass.shape, pass.image_stride, body);
}

template <class T, Order kOrder, Residual kResidual>
void apply_kind(const Apply& pass) {
  if (pass.act == Act::kIdentity) return apply_pass<T, kOrder, kResidual, Kind::kIdentity>(pass);
  if (pass.act == Act::kRelu) return apply_pass<T, kOrder, kResidual, Kind::kRelu>(pass);
  apply_pass<T, kOrder, kResidual, Kind::kAny>(pass);
}

}  // namespace

void apply(const Apply& pass) {
  with_type(pass.dtype, [&](auto element) {
    using T = decltype(element);
    with_order(pass.shape.order, [&](auto order) {
      constexpr Order kOrder = decltype(order)::kOrder;
      if (!pass.r) return apply_kind<T, kOrder, Residual::kNone>(pass);
      if (!pass.r_affine.scale) return apply_kind<T, kOrder, Residual::kPlain>(pass);
      apply_kind<T, kOrder, Residual::kAffine>(pass);
    });
  });
}

}  // namespace fusedres::FUSEDRES_ISA

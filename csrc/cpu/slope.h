// g = dy * act'(z) at one place, from whatever tells the slope.
#pragma once

#include "activation.h"
#include "passes.h"

namespace fusedres::FUSEDRES_ISA {

// kReluInput: from z recomputed. kAny: the activation that `act` names, from its output or from z recomputed.
enum class SlopeKind { kOne, kMask, kReluOutput, kReluInput, kAny };

inline SlopeKind slope_kind(const Slope& slope) {
  if (slope.mask) return SlopeKind::kMask;
  if (slope.act == Act::kIdentity) return SlopeKind::kOne;
  if (slope.act != Act::kRelu) return SlopeKind::kAny;
  return slope.y ? SlopeKind::kReluOutput : SlopeKind::kReluInput;
}

template <class T, Order kOrder, class Lanes>
FUSEDRES_INLINE VecOf<T> affine_at(const void* operand, const Affine& constants, int64_t gated,
                                   const Place& at, Lanes lanes) {
  using A = Accumulation<T>;
  auto table = [&](const void* values, int64_t offset) {
    return per_channel<kOrder>(static_cast<const A*>(values) + offset, at, lanes);
  };
  const VecOf<T> value = load(static_cast<const T*>(operand) + at.element, lanes);
  if (!constants.scale) return value;
  return affine(value, table(constants.mean, 0), table(constants.scale, gated),
                table(constants.shift, gated));
}

template <class T, Order kOrder, SlopeKind kKind, class Lanes>
FUSEDRES_INLINE VecOf<T> gradient_at(const Slope& slope, const Place& at, Lanes lanes) {
  using V = VecOf<T>;
  const V dy = load(static_cast<const T*>(slope.dy) + at.element, lanes);
  if constexpr (kKind == SlopeKind::kMask) {
    return keep(load_bits<Accumulation<T>>(slope.mask + at.mask, lanes), dy);
  } else if constexpr (kKind == SlopeKind::kReluOutput) {
    return Relu::gradient(load(static_cast<const T*>(slope.y) + at.element, lanes), dy);
  } else if constexpr (kKind == SlopeKind::kReluInput) {
    return Relu::gradient(affine_at<T, kOrder>(slope.x, slope.x_affine, at.gated, at, lanes), dy);
  } else if constexpr (kKind == SlopeKind::kAny) {
    if (from_output(slope.act))
      return activation_gradient(slope.act, load(static_cast<const T*>(slope.y) + at.element, lanes), dy);
    V z = affine_at<T, kOrder>(slope.x, slope.x_affine, at.gated, at, lanes);
    if (slope.r) z = z + affine_at<T, kOrder>(slope.r, slope.r_affine, 0, at, lanes);
    return within(activation_gradient(slope.act, z, dy), lanes);
  } else {
    return dy;
  }
}

// f(kind) with the slope's kind as a type.
template <SlopeKind kind>
struct SlopeTag {
  static constexpr SlopeKind kKind = kind;
};

template <class F>
FUSEDRES_INLINE void with_slope(const Slope& slope, const F& f) {
  switch (slope_kind(slope)) {
    case SlopeKind::kOne:
      return f(SlopeTag<SlopeKind::kOne>{});
    case SlopeKind::kMask:
      return f(SlopeTag<SlopeKind::kMask>{});
    case SlopeKind::kReluOutput:
      return f(SlopeTag<SlopeKind::kReluOutput>{});
    case SlopeKind::kReluInput:
      return f(SlopeTag<SlopeKind::kReluInput>{});
    case SlopeKind::kAny:
      return f(SlopeTag<SlopeKind::kAny>{});
  }
}

}  // namespace fusedres::FUSEDRES_ISA

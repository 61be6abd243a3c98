// Per-channel constants: from what the ops are given to the tables that the passes read.
#pragma once

#include "passes.h"

namespace fusedres::FUSEDRES_ISA {

// f(A{}) for the accumulation type of a data type.
template <class F>
FUSEDRES_INLINE void with_accumulation(DType dtype, const F& f) {
  with_type(dtype, [&](auto element) { f(Accumulation<decltype(element)>{}); });
}

// Whether the gate differs between images, so that what it is folded into has a row an image.
inline bool per_image(const Gate& gate) { return gate.data && gate.image_stride != 0; }

inline double gate_value(const Gate& gate, int64_t image, int64_t channel) {
  if (!gate.data) return 1;
  const int64_t i = image * gate.image_stride + channel * gate.channel_stride;
  switch (gate.dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(gate.data)[i];
    case DType::kFloat64:
      return static_cast<const double*>(gate.data)[i];
    case DType::kBFloat16:
      return widen(static_cast<const BFloat16*>(gate.data)[i]);
    case DType::kFloat16:
      return widen(static_cast<const Half*>(gate.data)[i]);
  }
  __builtin_unreachable();
}

// An operand's t -> (t - (mean + mean_low)) * rstd * weight + bias; absent members are null. An affine's
// scale is its weight.
template <class A>
struct Constants {
  const A* mean;
  const A* mean_low;
  const A* rstd;
  const A* weight;
  const A* bias;

  bool present() const { return mean || rstd || weight || bias; }
  double low(int64_t c) const { return mean_low ? mean_low[c] : 0; }
  double scale(int64_t c) const { return double{rstd ? rstd[c] : A{1}} * double{weight ? weight[c] : A{1}}; }

  static Constants of(const AffineOperand& operand) {
    return {static_cast<const A*>(operand.mean), nullptr, nullptr, static_cast<const A*>(operand.scale),
            static_cast<const A*>(operand.bias)};
  }
  static Constants of(const NormOperand& operand, int64_t channels) {
    if (operand.source == Statistics::kAbsent) return {};
    const A* const stats = static_cast<const A*>(operand.stats);
    return {stats, stats + channels, stats + 2 * channels, static_cast<const A*>(operand.weight),
            static_cast<const A*>(operand.bias)};
  }
};

// Few channels make short rows: then several pixels of channels_last are taken for one of `repeats` times as
// many channels, and what is per channel repeats likewise.
struct WideShape {
  Shape shape;
  int64_t repeats;
};

inline WideShape widen_rows(const Shape& shape, const Gate& gate, bool with_mask) {
  // Every pixel's mask begins on a byte of its own.
  if (shape.order != Order::kPixels || (with_mask && shape.channels % 8 != 0)) return {shape, 1};
  const int64_t images = per_image(gate) ? shape.images : 1, pixels = shape.rows() / images;
  int64_t repeats = maximum<int64_t>(1, kChannelTile / shape.channels);
  while (pixels % repeats != 0) --repeats;
  return {{images, shape.channels * repeats, pixels / repeats, shape.order}, repeats};
}

// Completes `rows` rows of a table of which each row's first period is there.
template <class A>
void repeat(A* table, int64_t rows, const WideShape& wide) {
  const int64_t channels = wide.shape.channels, period = channels / wide.repeats;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t c = period; c < channels; ++c)
      table[row * channels + c] = table[row * channels + c - period];
}

// The tables of gate * (t - mean) * scale + gate * shift; the mean's low part goes into the shift.
template <class A>
Affine fold(const Constants<A>& constants, const Gate& gate, const WideShape& wide, Arena& arena) {
  const int64_t channels = wide.shape.channels, narrow = channels / wide.repeats;
  const int64_t rows = per_image(gate) ? wide.shape.images : 1;
  A* const mean = arena.take<A>(channels);
  A* const scale = arena.take<A>(rows * channels);
  A* const shift = arena.take<A>(rows * channels);
  for (int64_t c = 0; c < narrow; ++c) {
    mean[c] = constants.mean ? constants.mean[c] : A{0};
    scale[c] = static_cast<A>(constants.scale(c));
    // -0 for an absent bias: t + -0 is t for every t.
    const double bias = constants.bias ? double{constants.bias[c]} : -0.0;
    shift[c] = static_cast<A>(bias - constants.low(c) * double{scale[c]});
  }
  if (gate.data) {
    for (int64_t image = rows; image-- > 0;) {
      for (int64_t c = 0; c < narrow; ++c) {
        const double k = gate_value(gate, image, c);
        scale[image * channels + c] = static_cast<A>(k * double{scale[c]});
        // An infinite gate must not meet a shift of 0.
        shift[image * channels + c] = shift[c] == 0 ? shift[c] : static_cast<A>(k * double{shift[c]});
      }
    }
  }
  repeat(mean, 1, wide);
  repeat(scale, rows, wide);
  repeat(shift, rows, wide);
  return {mean, scale, shift};
}

}  // namespace fusedres::FUSEDRES_ISA

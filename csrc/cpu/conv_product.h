// One step of conv_act's sums: the products of as many inputs as one weight's vector holds.
//
//   float32   one input a step
//   bfloat16  two, side by side in memory, as the instruction takes them; without it, or where it is the
//             slower way (FUSEDRES_WIDENED), x is read from a copy in float32, and the weights are widened
//             in two parts of one product each
#pragma once

#include "memory.h"

namespace fusedres::FUSEDRES_ISA {

template <class T>
struct Product;

template <>
struct Product<float> {
  static constexpr int kInputs = 1, kParts = 1;
  using Value = float;  // of x
  using Operand = Vec<float>;

  static FUSEDRES_INLINE Operand weights(const float* p, int) { return load(p, AllLanes{}); }
  static FUSEDRES_INLINE Operand values(const float* p, int) { return broadcast(*p); }
  static FUSEDRES_INLINE Vec<float> add(Vec<float> sum, Operand value, Operand weight) {
    return multiply_add(value, weight, sum);
  }
};

// Pairs of neighbouring values as words, the first in the lower half.
FUSEDRES_INLINE Words pairs_at(const BFloat16* p) {
  Words words;
  __builtin_memcpy(&words, p, sizeof words);
  return words;
}

#if defined(__AVX512BF16__) && !defined(FUSEDRES_WIDENED)
template <>
struct Product<BFloat16> {
  static constexpr int kInputs = 2, kParts = 1;
  using Value = BFloat16;
  using Operand = __m512bh;

  static FUSEDRES_INLINE Operand weights(const BFloat16* p, int) { return bit_cast<Operand>(pairs_at(p)); }
  static FUSEDRES_INLINE Operand values(const BFloat16* p, int) {
    uint32_t pair;
    __builtin_memcpy(&pair, p, sizeof pair);
    return of(pair);
  }
  // Of a run's end, where there is one value left.
  static FUSEDRES_INLINE Operand last(const BFloat16* p, int) { return of(p->bits); }
  static FUSEDRES_INLINE Vec<float> add(Vec<float> sum, Operand values, Operand weights) {
    return {bit_cast<Vec<float>::Native>(_mm512_dpbf16_ps(bit_cast<__m512>(sum.v), values, weights))};
  }

 private:
  static FUSEDRES_INLINE Operand of(uint32_t pair) {
    return bit_cast<Operand>(_mm512_set1_epi32(static_cast<int>(pair)));
  }
};
#else
template <>
struct Product<BFloat16> {
  static constexpr int kInputs = 2, kParts = 2;
  using Value = float;
  using Operand = Vec<float>;

  static FUSEDRES_INLINE Operand weights(const BFloat16* p, int part) {
    const Words pairs = pairs_at(p);
    return {bit_cast<Vec<float>::Native>(part ? pairs & 0xffff0000u : pairs << 16)};
  }
  static FUSEDRES_INLINE Operand values(const float* p, int part) { return broadcast(p[part]); }
  static FUSEDRES_INLINE Operand last(const float* p, int part) { return broadcast(part ? 0.0f : *p); }
  static FUSEDRES_INLINE Vec<float> add(Vec<float> sum, Operand value, Operand weight) {
    return multiply_add(value, weight, sum);
  }
};
#endif

// What conv_act reads x as, and conv_dweight x and dy: T, or float32 in its place.
template <class T>
using Value = typename Product<T>::Value;
template <class T>
constexpr bool kWidens = sizeof(Value<T>) > sizeof(T);

}  // namespace fusedres::FUSEDRES_ISA

// One bfloat16 or half value to and from float in integer arithmetic, round to nearest even, NaN kept.
#pragma once

#include "../params.h"
#include "simd.h"

namespace fusedres::FUSEDRES_ISA {

template <class To, class From>
FUSEDRES_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

FUSEDRES_INLINE float widen(BFloat16 value) { return bit_cast<float>(uint32_t{value.bits} << 16); }
FUSEDRES_INLINE float widen(float value) { return value; }
FUSEDRES_INLINE double widen(double value) { return value; }

FUSEDRES_INLINE float widen(Half value) {
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16, magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00) return bit_cast<float>(sign | magnitude << 13 | 0x7f800000u);
  // As the fraction of a float with exponent 2^-112 this is exact for denormals too.
  const float scaled = bit_cast<float>(magnitude << 13) * 0x1p112f;
  return bit_cast<float>(sign | bit_cast<uint32_t>(scaled));
}

FUSEDRES_INLINE BFloat16 narrow_to_bfloat16(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value), upper = bits >> 16;
  return {static_cast<uint16_t>(value != value ? upper | 0x40 : (bits + 0x7fff + (upper & 1)) >> 16)};
}

FUSEDRES_INLINE Half narrow_to_half(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value), sign = bits >> 16 & 0x8000u,
                 magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u | (magnitude >> 13 & 0x3ffu))};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};
  if (magnitude < 0x38800000u) {  // denormal: the addition rounds it to a multiple of 2^-24
    const uint32_t rounded = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - bit_cast<uint32_t>(0.5f);
    return {static_cast<uint16_t>(sign | rounded)};
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
  return {static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
}

}  // namespace fusedres::FUSEDRES_ISA

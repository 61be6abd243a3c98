#pragma once

#include <cuda_runtime.h>

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __nv_bfloat162_raw {
  uint16_t x, y;
};

inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  const uint32_t bits = emulated_bits(value);
  if (value != value) return {static_cast<uint16_t>(bits >> 16 | 0x40)};  // a GPU gives 0x7fff, a NaN too
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline __nv_bfloat162_raw __floats2bfloat162_rn(float low, float high) {
  return {__float2bfloat16_rn(low).bits, __float2bfloat16_rn(high).bits};
}

#pragma once

#include <cuda_runtime.h>

#include "cpu/half.h"

struct __half {
  uint16_t bits;
};
struct __half2_raw {
  uint16_t x, y;
};

inline uint16_t __half_as_ushort(__half value) { return value.bits; }
inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline float __half2float(__half value) { return fusedres::portable::widen(fusedres::Half{value.bits}); }
inline __half __float2half_rn(float value) { return {fusedres::portable::narrow_to_half(value).bits}; }
inline __half2_raw __floats2half2_rn(float low, float high) {
  return {__float2half_rn(low).bits, __float2half_rn(high).bits};
}

// Elements of tensors, packs of them that move in one access, and numbers as epilogue.h wants them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "../epilogue.h"
#include "../params.h"

#define FUSEDRES_DEVICE __device__ __forceinline__

namespace fusedres::cuda {

template <class T>
struct AccumulationOf {
  using Type = float;
};
template <>
struct AccumulationOf<double> {
  using Type = double;
};
template <class T>
using Accumulation = typename AccumulationOf<T>::Type;

FUSEDRES_DEVICE float widen(float value) { return value; }
FUSEDRES_DEVICE double widen(double value) { return value; }
FUSEDRES_DEVICE float widen(BFloat16 value) { return __uint_as_float(uint32_t{value.bits} << 16); }
FUSEDRES_DEVICE float widen(Half value) { return __half2float(__ushort_as_half(value.bits)); }

FUSEDRES_DEVICE void narrow(float value, float& to) { to = value; }
FUSEDRES_DEVICE void narrow(double value, double& to) { to = value; }
FUSEDRES_DEVICE void narrow(float value, BFloat16& to) {
  to = {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
}
FUSEDRES_DEVICE void narrow(float value, Half& to) { to = {__half_as_ushort(__float2half_rn(value))}; }

// Both at once: one instruction, where each alone takes one at a quarter of the rate.
FUSEDRES_DEVICE uint32_t narrow_pair(float low, float high, BFloat16) {
  const __nv_bfloat162_raw pair = __floats2bfloat162_rn(low, high);
  return pair.x | static_cast<uint32_t>(pair.y) << 16;
}
FUSEDRES_DEVICE uint32_t narrow_pair(float low, float high, Half) {
  const __half2_raw pair = __floats2half2_rn(low, high);
  return pair.x | static_cast<uint32_t>(pair.y) << 16;
}

// V neighbouring elements: 16 bytes, or one element where rows do not allow more. Two elements of 16 bits
// share a word: apart each would take a register.
template <class T, int V>
struct alignas(V * sizeof(T)) Pack {
  static constexpr int kPerWord = sizeof(T) * V >= 4 && sizeof(T) == 2 ? 2 : 1;
  using Word = std::conditional_t<kPerWord == 2, uint32_t, T>;

  Word words[V / kPerWord];

  FUSEDRES_DEVICE Accumulation<T> operator[](int v) const {
    if constexpr (kPerWord == 2)
      return widen(T{static_cast<uint16_t>(v % 2 ? words[v / 2] >> 16 : words[v / 2] & 0xffff)});
    else
      return widen(words[v]);
  }

  static FUSEDRES_DEVICE Pack of(const Accumulation<T> (&values)[V]) {
    Pack pack;
    if constexpr (kPerWord == 2) {
#pragma unroll
      for (int v = 0; v < V; v += 2) pack.words[v / 2] = narrow_pair(values[v], values[v + 1], T{});
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) narrow(values[v], pack.words[v]);
    }
    return pack;
  }
};

template <class T>
constexpr int kWide = 16 / static_cast<int>(sizeof(T));
// double is not worth instantiations of its own for packs.
template <>
inline constexpr int kWide<double> = 1;

template <class A>
struct Real {
  A v;
};

template <class A>
FUSEDRES_HOST_DEVICE Real<A> operator+(Real<A> a, Real<A> b) {
  return {a.v + b.v};
}
template <class A>
FUSEDRES_HOST_DEVICE Real<A> operator-(Real<A> a, Real<A> b) {
  return {a.v - b.v};
}
template <class A>
FUSEDRES_HOST_DEVICE Real<A> operator-(Real<A> a) {
  return {-a.v};
}
template <class A>
FUSEDRES_HOST_DEVICE Real<A> operator*(Real<A> a, Real<A> b) {
  return {a.v * b.v};
}
template <class A>
FUSEDRES_HOST_DEVICE Real<A> operator/(Real<A> a, Real<A> b) {
  return {a.v / b.v};
}
template <class A>
FUSEDRES_HOST_DEVICE bool operator<=(Real<A> a, Real<A> b) {
  return a.v <= b.v;
}
template <class A>
FUSEDRES_HOST_DEVICE bool operator>=(Real<A> a, Real<A> b) {
  return a.v >= b.v;
}
template <class A>
FUSEDRES_HOST_DEVICE bool operator<(Real<A> a, Real<A> b) {
  return a.v < b.v;
}
template <class A>
FUSEDRES_HOST_DEVICE bool operator>(Real<A> a, Real<A> b) {
  return a.v > b.v;
}
template <class A>
FUSEDRES_HOST_DEVICE Real<A> select(bool condition, Real<A> a, Real<A> b) {
  return condition ? a : b;
}
FUSEDRES_HOST_DEVICE Real<float> exp(Real<float> x) { return {expf(x.v)}; }
FUSEDRES_HOST_DEVICE Real<double> exp(Real<double> x) { return {::exp(x.v)}; }
FUSEDRES_HOST_DEVICE Real<float> normal_cdf(Real<float> x) {
  return {0.5f * erfcf(x.v * -0.70710678118654752f)};
}
FUSEDRES_HOST_DEVICE Real<double> normal_cdf(Real<double> x) {
  return {0.5 * erfc(x.v * -0.70710678118654752440)};
}

}  // namespace fusedres::cuda

namespace fusedres {

template <class A>
struct Splat<cuda::Real<A>> {
  static FUSEDRES_HOST_DEVICE cuda::Real<A> of(double c) { return {static_cast<A>(c)}; }
};

}  // namespace fusedres

// A vector of kLanes values with the operators that epilogue.h asks for, in the namespace of one instruction
// set.
//
// A struct of that namespace and not the bare vector type: two variants then never share an instantiation.
#pragma once

#include <cstdint>

#include "../epilogue.h"

#if defined(__AVX2__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12: the header's own _mm512_undefined_ps()
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#define FUSEDRES_INLINE inline __attribute__((always_inline))
#define FUSEDRES_INLINE_LAMBDA __attribute__((always_inline))

namespace fusedres::FUSEDRES_ISA {

// A multiple of 8 everywhere, so that the mask bits of a vector are whole bytes.
template <class A>
struct Width {
  static constexpr int kLanes = 8;
};

#if defined(__AVX512F__)
template <>
struct Width<float> {
  static constexpr int kLanes = 16;
};
#endif

template <class A>
struct Vec {
  static constexpr int kLanes = Width<A>::kLanes;
  typedef A Native __attribute__((vector_size(sizeof(A) * kLanes)));
  Native v;
};

template <class A>
FUSEDRES_INLINE Vec<A> broadcast(A value) {
  return {value - typename Vec<A>::Native{}};  // minus and not plus 0: that would lose the sign of -0
}

template <class A>
struct Condition {
  decltype(typename Vec<A>::Native{} < typename Vec<A>::Native{}) lanes;
};

template <class A>
FUSEDRES_INLINE Vec<A> operator+(Vec<A> a, Vec<A> b) {
  return {a.v + b.v};
}
template <class A>
FUSEDRES_INLINE Vec<A> operator-(Vec<A> a, Vec<A> b) {
  return {a.v - b.v};
}
template <class A>
FUSEDRES_INLINE Vec<A> operator*(Vec<A> a, Vec<A> b) {
  return {a.v * b.v};
}
template <class A>
FUSEDRES_INLINE Vec<A> operator/(Vec<A> a, Vec<A> b) {
  return {a.v / b.v};
}
template <class A>
FUSEDRES_INLINE Vec<A> operator-(Vec<A> a) {
  return {-a.v};
}
template <class A>
FUSEDRES_INLINE Condition<A> operator<(Vec<A> a, Vec<A> b) {
  return {a.v < b.v};
}
template <class A>
FUSEDRES_INLINE Condition<A> operator<=(Vec<A> a, Vec<A> b) {
  return {a.v <= b.v};
}
template <class A>
FUSEDRES_INLINE Condition<A> operator>(Vec<A> a, Vec<A> b) {
  return {a.v > b.v};
}
template <class A>
FUSEDRES_INLINE Condition<A> operator>=(Vec<A> a, Vec<A> b) {
  return {a.v >= b.v};
}
template <class A>
FUSEDRES_INLINE Condition<A> operator!=(Vec<A> a, Vec<A> b) {
  return {a.v != b.v};
}
template <class A>
FUSEDRES_INLINE Condition<A> operator|(Condition<A> a, Condition<A> b) {
  return {a.lanes | b.lanes};
}
template <class A>
FUSEDRES_INLINE Vec<A> select(Condition<A> condition, Vec<A> a, Vec<A> b) {
  return {condition.lanes ? a.v : b.v};
}

// a * b + c, rounded once where the instruction set can.
template <class A>
FUSEDRES_INLINE Vec<A> multiply_add(Vec<A> a, Vec<A> b, Vec<A> c) {
  return {a.v * b.v + c.v};
}

// One bit a lane, set where !(z <= bound): NaN sets it.
template <class A>
FUSEDRES_INLINE unsigned bits_above(Vec<A> z, A bound) {
  unsigned bits = 0;
  for (int lane = 0; lane < Vec<A>::kLanes; ++lane) bits |= unsigned{!(z.v[lane] <= bound)} << lane;
  return bits;
}

// v where the lane's bit is set, else 0.
template <class A>
FUSEDRES_INLINE Vec<A> keep(unsigned bits, Vec<A> v) {
  Vec<A> kept{};
  for (int lane = 0; lane < Vec<A>::kLanes; ++lane) kept.v[lane] = bits >> lane & 1 ? v.v[lane] : A{0};
  return kept;
}

// The sum over lanes in double, in fixed order.
template <class A>
FUSEDRES_INLINE double sum_lanes(Vec<A> v) {
  double sum = 0;
  for (int lane = 0; lane < Vec<A>::kLanes; ++lane) sum += v.v[lane];
  return sum;
}

// totals[lane] += v[lane], in double.
template <class A>
FUSEDRES_INLINE void add_lanes(double* totals, Vec<A> v) {
  for (int lane = 0; lane < Vec<A>::kLanes; ++lane) totals[lane] += v.v[lane];
}

#if defined(__AVX512F__)
FUSEDRES_INLINE unsigned bits_above(Vec<float> z, float bound) {
  return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(z.v), _mm512_set1_ps(bound), _CMP_NLE_UQ);
}
FUSEDRES_INLINE Vec<float> keep(unsigned bits, Vec<float> v) {
  return {_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), v.v)};
}
FUSEDRES_INLINE double sum_lanes(Vec<float> v) {
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(v.v));
  const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v.v, 1));
  return _mm512_reduce_add_pd(low + high);
}
// Written out: the compiler takes the lanes one by one.
FUSEDRES_INLINE void add_lanes(double* totals, Vec<float> v) {
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(v.v));
  const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v.v, 1));
  _mm512_storeu_pd(totals, _mm512_loadu_pd(totals) + low);
  _mm512_storeu_pd(totals + 8, _mm512_loadu_pd(totals + 8) + high);
}
#elif defined(__AVX2__)
FUSEDRES_INLINE unsigned bits_above(Vec<float> z, float bound) {
  return _mm256_movemask_ps(_mm256_cmp_ps(z.v, _mm256_set1_ps(bound), _CMP_NLE_UQ));
}
FUSEDRES_INLINE Vec<float> keep(unsigned bits, Vec<float> v) {
  const __m256i lane_bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane_bit);
  return {_mm256_and_ps(v.v, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane_bit)))};
}
FUSEDRES_INLINE double sum_lanes(Vec<float> v) {
  const __m256d sum =
      _mm256_cvtps_pd(_mm256_castps256_ps128(v.v)) + _mm256_cvtps_pd(_mm256_extractf128_ps(v.v, 1));
  const __m128d pair = _mm256_castpd256_pd128(sum) + _mm256_extractf128_pd(sum, 1);
  return pair[0] + pair[1];
}
FUSEDRES_INLINE void add_lanes(double* totals, Vec<float> v) {
  const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(v.v));
  const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(v.v, 1));
  _mm256_storeu_pd(totals, _mm256_loadu_pd(totals) + low);
  _mm256_storeu_pd(totals + 4, _mm256_loadu_pd(totals + 4) + high);
}
#endif

}  // namespace fusedres::FUSEDRES_ISA

namespace fusedres {

template <class A>
struct Splat<FUSEDRES_ISA::Vec<A>> {
  static FUSEDRES_INLINE FUSEDRES_ISA::Vec<A> of(double c) {
    return FUSEDRES_ISA::broadcast(static_cast<A>(c));
  }
};

}  // namespace fusedres

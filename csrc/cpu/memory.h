// Vectors from and to memory in each data type: all lanes, or the first few of a row's end, where the rest
// reads as 0.
#pragma once

#include "half.h"
#include "simd.h"

namespace fusedres::FUSEDRES_ISA {

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
template <class T>
using VecOf = Vec<Accumulation<T>>;

struct AllLanes {};
struct FirstLanes {
  int count;
};
template <class A>
FUSEDRES_INLINE void add_lanes(double* totals, Vec<A> v, AllLanes) {
  add_lanes(totals, v);
}
template <class A>
FUSEDRES_INLINE void add_lanes(double* totals, Vec<A> v, FirstLanes lanes) {
  for (int lane = 0; lane < lanes.count; ++lane) totals[lane] += v.v[lane];
}

FUSEDRES_INLINE Vec<float> load(const float* p, AllLanes) {
  Vec<float> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

FUSEDRES_INLINE Vec<double> load(const double* p, AllLanes) {
  Vec<double> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

typedef int32_t LaneNumbers __attribute__((vector_size(sizeof(float) * Vec<float>::kLanes)));

// Lane l is v's lane from[l].
FUSEDRES_INLINE Vec<float> shuffle(Vec<float> v, LaneNumbers from) {
#if defined(__AVX512F__)
  return bit_cast<Vec<float>>(_mm512_permutexvar_ps(bit_cast<__m512i>(from), bit_cast<__m512>(v)));
#elif defined(__AVX2__)
  return bit_cast<Vec<float>>(_mm256_permutevar8x32_ps(bit_cast<__m256>(v), bit_cast<__m256i>(from)));
#else
  Vec<float> shuffled{};
  for (int lane = 0; lane < Vec<float>::kLanes; ++lane) shuffled.v[lane] = v.v[from[lane]];
  return shuffled;
#endif
}

typedef uint16_t Halves __attribute__((vector_size(2 * Vec<float>::kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * Vec<float>::kLanes)));

#if defined(__AVX512F__)
FUSEDRES_INLINE Words to_words(Halves halves) {
  return bit_cast<Words>(_mm512_cvtepu16_epi32(bit_cast<__m256i>(halves)));
}
FUSEDRES_INLINE Halves to_halves(Words words) {
  return bit_cast<Halves>(_mm512_cvtepi32_epi16(bit_cast<__m512i>(words)));
}
#elif defined(__AVX2__)
FUSEDRES_INLINE Words to_words(Halves halves) {
  return bit_cast<Words>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(halves)));
}
FUSEDRES_INLINE Halves to_halves(Words words) {
  const __m256i bits = bit_cast<__m256i>(words);
  return bit_cast<Halves>(_mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1)));
}
#else
FUSEDRES_INLINE Words to_words(Halves halves) { return __builtin_convertvector(halves, Words); }
FUSEDRES_INLINE Halves to_halves(Words words) { return __builtin_convertvector(words, Halves); }
#endif

// A bfloat16 is the upper half of its float.
#if defined(__AVX512F__)
FUSEDRES_INLINE Vec<float> widen(Halves halves) {
  constexpr __mmask32 kUpper = 0xaaaaaaaa;
  const __m512i source = _mm512_set_epi16(15, 15, 14, 14, 13, 13, 12, 12, 11, 11, 10, 10, 9, 9, 8, 8, 7, 7, 6,
                                          6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
  const __m512i all = _mm512_castsi256_si512(bit_cast<__m256i>(halves));
  return {bit_cast<Vec<float>::Native>(_mm512_maskz_permutexvar_epi16(kUpper, source, all))};
}
#else
FUSEDRES_INLINE Vec<float> widen(Halves halves) {
  return {bit_cast<Vec<float>::Native>(to_words(halves) << 16)};
}
#endif

FUSEDRES_INLINE Vec<float> load(const BFloat16* p, AllLanes) {
  Halves halves;
  __builtin_memcpy(&halves, p, sizeof halves);
  return widen(halves);
}

FUSEDRES_INLINE void store(float* p, Vec<float> v) { __builtin_memcpy(p, &v, sizeof v); }
FUSEDRES_INLINE void store(double* p, Vec<double> v) { __builtin_memcpy(p, &v, sizeof v); }

// Round to nearest even; a NaN keeps its upper bits and becomes quiet.
FUSEDRES_INLINE Halves narrow_to_bfloat16(Vec<float> v) {
  const Words bits = reinterpret_cast<Words>(v.v), upper = bits >> 16;
  const Words rounded = (bits + 0x7fff + (upper & 1)) >> 16;
  return to_halves(v.v != v.v ? upper | 0x40 : rounded);
}

#if defined(__AVX512BF16__)
FUSEDRES_INLINE Halves to_bfloat16(Vec<float> v) {
  // The instruction takes denormals for 0: those rare vectors are rounded by hand.
  constexpr int kDenormal = 0x20;
  if (__builtin_expect(_mm512_fpclass_ps_mask(v.v, kDenormal) != 0, 0)) return narrow_to_bfloat16(v);
  return bit_cast<Halves>(_mm512_cvtneps_pbh(v.v));
}
#else
FUSEDRES_INLINE Halves to_bfloat16(Vec<float> v) { return narrow_to_bfloat16(v); }
#endif

FUSEDRES_INLINE void store(BFloat16* p, Vec<float> v) {
  const Halves halves = to_bfloat16(v);
  __builtin_memcpy(p, &halves, sizeof halves);
}

#if defined(__AVX512F__)
FUSEDRES_INLINE Vec<float> load(const Half* p, AllLanes) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
FUSEDRES_INLINE Halves to_half(Vec<float> v) {
  return bit_cast<Halves>(_mm512_cvtps_ph(v.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__F16C__)
FUSEDRES_INLINE Vec<float> load(const Half* p, AllLanes) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
FUSEDRES_INLINE Halves to_half(Vec<float> v) {
  return bit_cast<Halves>(_mm256_cvtps_ph(v.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
FUSEDRES_INLINE Vec<float> load(const Half* p, AllLanes) {
  Vec<float> v;
  for (int lane = 0; lane < Vec<float>::kLanes; ++lane) v.v[lane] = widen(p[lane]);
  return v;
}
FUSEDRES_INLINE Halves to_half(Vec<float> v) {
  Halves halves;
  for (int lane = 0; lane < Vec<float>::kLanes; ++lane) halves[lane] = narrow_to_half(v.v[lane]).bits;
  return halves;
}
#endif

FUSEDRES_INLINE void store(Half* p, Vec<float> v) {
  const Halves halves = to_half(v);
  __builtin_memcpy(p, &halves, sizeof halves);
}

template <class T>
FUSEDRES_INLINE VecOf<T> load(const T* p, FirstLanes lanes) {
  T row[VecOf<T>::kLanes] = {};
  for (int lane = 0; lane < lanes.count; ++lane) row[lane] = p[lane];
  return load(row, AllLanes{});
}

template <class T>
FUSEDRES_INLINE void store(T* p, VecOf<T> v, FirstLanes lanes) {
  T row[VecOf<T>::kLanes];
  store(row, v);
  for (int lane = 0; lane < lanes.count; ++lane) p[lane] = row[lane];
}

#if defined(__AVX512F__)
FUSEDRES_INLINE Vec<float> load(const float* p, FirstLanes lanes) {
  return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << lanes.count) - 1), p)};
}
FUSEDRES_INLINE void store(float* p, Vec<float> v, FirstLanes lanes) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << lanes.count) - 1), v.v);
}
FUSEDRES_INLINE Halves load_halves(const void* p, FirstLanes lanes) {
  return bit_cast<Halves>(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << lanes.count) - 1), p));
}
FUSEDRES_INLINE void store_halves(void* p, Halves halves, FirstLanes lanes) {
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << lanes.count) - 1), bit_cast<__m256i>(halves));
}
FUSEDRES_INLINE Vec<float> load(const BFloat16* p, FirstLanes lanes) { return widen(load_halves(p, lanes)); }
FUSEDRES_INLINE void store(BFloat16* p, Vec<float> v, FirstLanes lanes) {
  store_halves(p, to_bfloat16(v), lanes);
}
FUSEDRES_INLINE Vec<float> load(const Half* p, FirstLanes lanes) {
  return {_mm512_cvtph_ps(bit_cast<__m256i>(load_halves(p, lanes)))};
}
FUSEDRES_INLINE void store(Half* p, Vec<float> v, FirstLanes lanes) { store_halves(p, to_half(v), lanes); }
#endif

template <class T>
FUSEDRES_INLINE void store(T* p, VecOf<T> v, AllLanes) {
  store(p, v);
}

// Past the caches; p on a vector's boundary.
template <class T>
FUSEDRES_INLINE void stream(T* p, VecOf<T> v) {
  store(p, v);
}

#if defined(__AVX512F__)
FUSEDRES_INLINE void stream_halves(void* p, Halves halves) {
  _mm256_stream_si256(static_cast<__m256i*>(p), bit_cast<__m256i>(halves));
}
FUSEDRES_INLINE void stream(float* p, Vec<float> v) { _mm512_stream_ps(p, v.v); }
#elif defined(__AVX2__)
FUSEDRES_INLINE void stream_halves(void* p, Halves halves) {
  _mm_stream_si128(static_cast<__m128i*>(p), bit_cast<__m128i>(halves));
}
FUSEDRES_INLINE void stream(float* p, Vec<float> v) { _mm256_stream_ps(p, v.v); }
#endif

#if defined(__AVX2__)
FUSEDRES_INLINE void stream(BFloat16* p, Vec<float> v) { stream_halves(p, to_bfloat16(v)); }
FUSEDRES_INLINE void stream(Half* p, Vec<float> v) { stream_halves(p, to_half(v)); }
FUSEDRES_INLINE void end_stream() { _mm_sfence(); }
#else
FUSEDRES_INLINE void end_stream() {}
#endif

FUSEDRES_INLINE unsigned lane_mask(FirstLanes lanes) { return (1u << lanes.count) - 1; }

template <class A>
FUSEDRES_INLINE void store_bits(uint8_t* p, unsigned bits, AllLanes) {
  __builtin_memcpy(p, &bits, Vec<A>::kLanes / 8);
}
template <class A>
FUSEDRES_INLINE void store_bits(uint8_t* p, unsigned bits, FirstLanes lanes) {
  bits &= lane_mask(lanes);
  for (int byte = 0; 8 * byte < lanes.count; ++byte) p[byte] = static_cast<uint8_t>(bits >> 8 * byte);
}
template <class A>
FUSEDRES_INLINE unsigned load_bits(const uint8_t* p, AllLanes) {
  unsigned bits = 0;
  __builtin_memcpy(&bits, p, Vec<A>::kLanes / 8);
  return bits;
}
template <class A>
FUSEDRES_INLINE unsigned load_bits(const uint8_t* p, FirstLanes lanes) {
  unsigned bits = 0;
  for (int byte = 0; 8 * byte < lanes.count; ++byte) bits |= unsigned{p[byte]} << 8 * byte;
  return bits;
}

// Small whole numbers as bytes.
template <class A>
struct Bytes {
  typedef int32_t Integers __attribute__((vector_size(4 * Vec<A>::kLanes)));
  typedef uint8_t Native __attribute__((vector_size(Vec<A>::kLanes)));
};
template <class A>
FUSEDRES_INLINE void store_bytes(uint8_t* p, Vec<A> v, AllLanes) {
  const auto integers = __builtin_convertvector(v.v, typename Bytes<A>::Integers);
  const auto bytes = __builtin_convertvector(integers, typename Bytes<A>::Native);
  __builtin_memcpy(p, &bytes, sizeof bytes);
}
template <class A>
FUSEDRES_INLINE void store_bytes(uint8_t* p, Vec<A> v, FirstLanes lanes) {
  for (int lane = 0; lane < lanes.count; ++lane) p[lane] = static_cast<uint8_t>(v.v[lane]);
}
template <class A>
FUSEDRES_INLINE Vec<A> load_bytes(const uint8_t* p, AllLanes) {
  typename Bytes<A>::Native bytes;
  __builtin_memcpy(&bytes, p, sizeof bytes);
  const auto integers = __builtin_convertvector(bytes, typename Bytes<A>::Integers);
  return {__builtin_convertvector(integers, typename Vec<A>::Native)};
}
template <class A>
FUSEDRES_INLINE Vec<A> load_bytes(const uint8_t* p, FirstLanes lanes) {
  uint8_t row[Vec<A>::kLanes] = {};
  for (int lane = 0; lane < lanes.count; ++lane) row[lane] = p[lane];
  return load_bytes<A>(row, AllLanes{});
}

// v as it reads after a store as T.
template <class T>
FUSEDRES_INLINE VecOf<T> rounded(VecOf<T> v) {
  T row[VecOf<T>::kLanes];
  store(row, v);
  return load(row, AllLanes{});
}

// v with 0 beyond a row's end.
template <class A>
FUSEDRES_INLINE Vec<A> within(Vec<A> v, AllLanes) {
  return v;
}
template <class A>
FUSEDRES_INLINE Vec<A> within(Vec<A> v, FirstLanes lanes) {
  return keep(lane_mask(lanes), v);
}

}  // namespace fusedres::FUSEDRES_ISA

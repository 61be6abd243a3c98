// exp and the normal distribution function of a vector.
#pragma once

#include "simd.h"

namespace fusedres::FUSEDRES_ISA {

// Horner's rule, the highest coefficient first.
template <class V, class... Coefficients>
FUSEDRES_INLINE V polynomial(V x, double highest, Coefficients... rest) {
  V sum = splat<V>(highest);
  ((sum = sum * x + splat<V>(rest)), ...);
  return sum;
}

// 2^n * p(r), n = round(x / ln 2), |r| <= ln(2) / 2; error below 2 ulp, NaN stays NaN.
FUSEDRES_INLINE Vec<float> exp(Vec<float> x) {
  using V = Vec<float>;
  typedef int32_t Integers __attribute__((vector_size(4 * V::kLanes)));
  const V highest = splat<V>(89), lowest = splat<V>(-104);  // beyond these exp is inf and 0
  x = select(x > highest, highest, select(x < lowest, lowest, x));
  const V rounding = splat<V>(12582912);  // 1.5 * 2^23: adding it leaves no fraction
  const V n = (x * splat<V>(1.44269504088896341) + rounding) - rounding;
  const V r = (x - n * splat<V>(0.693359375)) - n * splat<V>(-2.12194440e-4);
  V p = polynomial(r, 1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1,
                   5.0000001201e-1);
  p = p * r * r + r + splat<V>(1);
  // In two factors: 2^n alone leaves the normal range before the product does.
  const Integers exponent = __builtin_convertvector(n.v, Integers), half = exponent >> 1;
  const V first{reinterpret_cast<V::Native>((half + 127) << 23)};
  const V second{reinterpret_cast<V::Native>((exponent - half + 127) << 23)};
  return p * first * second;
}

// 0.5 * (1 + erf(z / sqrt(2))), erf as a rational function of z on [-4, 4].
FUSEDRES_INLINE Vec<float> normal_cdf(Vec<float> z) {
  using V = Vec<float>;
  const V four = splat<V>(4);
  V t = z * splat<V>(0.70710678118654752);
  t = select(t > four, four, select(t < -four, -four, t));
  const V t2 = t * t;
  const V p =
      polynomial(t2, -2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06,
                 -5.69250639462346e-05, -7.34990630326855e-04, -2.95459980854025e-03, -1.60960333262415e-02);
  const V q = polynomial(t2, -1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03,
                         -7.37332916720468e-03, -1.42647390514189e-02);
  return splat<V>(0.5) * (splat<V>(1) + t * p / q);
}

FUSEDRES_INLINE Vec<double> exp(Vec<double> x) {
  for (int lane = 0; lane < Vec<double>::kLanes; ++lane) x.v[lane] = __builtin_exp(x.v[lane]);
  return x;
}

FUSEDRES_INLINE Vec<double> normal_cdf(Vec<double> z) {
  for (int lane = 0; lane < Vec<double>::kLanes; ++lane)
    z.v[lane] = 0.5 * __builtin_erfc(z.v[lane] * -0.70710678118654752440);
  return z;
}

}  // namespace fusedres::FUSEDRES_ISA

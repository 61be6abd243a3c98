// Winograd's minimal filtering along one dimension: kTile outputs of a window of 3 from kPoints = kTile + 2
// products, out = A^T [(G w) * (B^T d)].
//
// The tile of 4 interpolates at 0, +-5/8, +-3/2 and infinity. Powers of 5/8 and 3/2 are exact in binary, and
// these points lose half as many digits as the usual 0, +-1, +-2.
//
// The tile of 7 interpolates at +-1/4, +-5/8, +-5/4, +-2 and infinity, and loses a digit more: in float32
// that is a hundredth of what rounding to bfloat16 loses. 7 divides the sides of most networks' images.
//
// dw = G^T [dm * (B^T d)] with dm = A dout: the gradient of the weights takes as few products.
#pragma once

#include "../epilogue.h"

namespace fusedres {

constexpr int kMostPoints = 9;

template <int kTile>
struct Winograd;

template <>
struct Winograd<2> {
  static constexpr int kPoints = 4;

  static constexpr double filter(int point, int k) {
    constexpr double kG[kPoints][3] = {{1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}};
    return kG[point][k];
  }
  template <class V>
  static FUSEDRES_HOST_DEVICE void input(const V (&d)[kPoints], V (&t)[kPoints]) {
    t[0] = d[0] - d[2];
    t[1] = d[1] + d[2];
    t[2] = d[2] - d[1];
    t[3] = d[3] - d[1];
  }
  template <class V>
  static FUSEDRES_HOST_DEVICE void output(const V (&m)[kPoints], V (&y)[2]) {
    y[0] = m[0] + m[1] + m[2];
    y[1] = m[1] - m[2] + m[3];
  }
  template <class V>
  static FUSEDRES_HOST_DEVICE void weights(const V (&w)[3], V (&u)[kPoints]) {
    const V half = splat<V>(0.5), even = half * (w[0] + w[2]), odd = half * w[1];
    u[0] = w[0];
    u[1] = even + odd;
    u[2] = even - odd;
    u[3] = w[2];
  }
  template <class V>
  static FUSEDRES_HOST_DEVICE void d_output(const V (&dy)[2], V (&dm)[kPoints]) {
    dm[0] = dy[0];
    dm[1] = dy[0] + dy[1];
    dm[2] = dy[0] - dy[1];
    dm[3] = dy[1];
  }
  template <class V>
  static FUSEDRES_HOST_DEVICE void d_weights(const V (&du)[kPoints], V (&dw)[3]) {
    const V half = splat<V>(0.5), even = half * (du[1] + du[2]);
    dw[0] = du[0] + even;
    dw[1] = half * (du[1] - du[2]);
    dw[2] = even + du[3];
  }
};

template <>
struct Winograd<4> {
  static constexpr int kPoints = 6;
  static constexpr double kA = 0.625, kA2 = kA * kA, kB = 1.5, kB2 = kB * kB;

  static constexpr double kOf0 = 1 / (kA2 * kB2);
  static constexpr double kOfA = 1 / (2 * kA2 * (kA2 - kB2)), kOfB = 1 / (2 * kB2 * (kB2 - kA2));

  static constexpr double filter(int point, int k) {
    constexpr double kG[kPoints][3] = {{kOf0, 0, 0},
                                       {kOfA, kOfA * kA, kOfA * kA2},
                                       {kOfA, -kOfA * kA, kOfA * kA2},
                                       {kOfB, kOfB * kB, kOfB * kB2},
                                       {kOfB, -kOfB * kB, kOfB * kB2},
                                       {0, 0, 1}};
    return kG[point][k];
  }
  template <class V>
  static FUSEDRES_HOST_DEVICE void input(const V (&d)[kPoints], V (&t)[kPoints]) {
    const V a2 = splat<V>(kA2), b2 = splat<V>(kB2), product = splat<V>(kA2 * kB2), sum = splat<V>(kA2 + kB2);
    const V even_a = d[4] - b2 * d[2], odd_a = splat<V>(kA) * (d[3] - b2 * d[1]);
    const V even_b = d[4] - a2 * d[2], odd_b = splat<V>(kB) * (d[3] - a2 * d[1]);
    t[0] = product * d[0] - sum * d[2] + d[4];
    t[1] = even_a + odd_a;
    t[2] = even_a - odd_a;
    t[3] = even_b + odd_b;
    t[4] = even_b - odd_b;
    t[5] = product * d[1] - sum * d[3] + d[5];
  }
  template <class V>
  static FUSEDRES_HOST_DEVICE void output(const V (&m)[kPoints], V (&y)[4]) {
    const V even_a = m[1] + m[2], odd_a = m[1] - m[2], even_b = m[3] + m[4], odd_b = m[3] - m[4];
    y[0] = m[0] + even_a + even_b;
    y[1] = splat<V>(kA) * odd_a + splat<V>(kB) * odd_b;
    y[2] = splat<V>(kA2) * even_a + splat<V>(kB2) * even_b;
    y[3] = splat<V>(kA2 * kA) * odd_a + splat<V>(kB2 * kB) * odd_b + m[5];
  }
  template <class V>
  static FUSEDRES_HOST_DEVICE void weights(const V (&w)[3], V (&u)[kPoints]) {
    const V even_a = splat<V>(kOfA) * w[0] + splat<V>(kOfA * kA2) * w[2], odd_a = splat<V>(kOfA * kA) * w[1];
    const V even_b = splat<V>(kOfB) * w[0] + splat<V>(kOfB * kB2) * w[2], odd_b = splat<V>(kOfB * kB) * w[1];
    u[0] = splat<V>(kOf0) * w[0];
    u[1] = even_a + odd_a;
    u[2] = even_a - odd_a;
    u[3] = even_b + odd_b;
    u[4] = even_b - odd_b;
    u[5] = w[2];
  }
  template <class V>
  static FUSEDRES_HOST_DEVICE void d_output(const V (&dy)[4], V (&dm)[kPoints]) {
    const V even_a = dy[0] + splat<V>(kA2) * dy[2], odd_a = splat<V>(kA) * dy[1] + splat<V>(kA2 * kA) * dy[3];
    const V even_b = dy[0] + splat<V>(kB2) * dy[2], odd_b = splat<V>(kB) * dy[1] + splat<V>(kB2 * kB) * dy[3];
    dm[0] = dy[0];
    dm[1] = even_a + odd_a;
    dm[2] = even_a - odd_a;
    dm[3] = even_b + odd_b;
    dm[4] = even_b - odd_b;
    dm[5] = dy[3];
  }
  template <class V>
  static FUSEDRES_HOST_DEVICE void d_weights(const V (&du)[kPoints], V (&dw)[3]) {
    const V even_a = splat<V>(kOfA) * (du[1] + du[2]), odd_a = splat<V>(kOfA * kA) * (du[1] - du[2]);
    const V even_b = splat<V>(kOfB) * (du[3] + du[4]), odd_b = splat<V>(kOfB * kB) * (du[3] - du[4]);
    dw[0] = splat<V>(kOf0) * du[0] + even_a + even_b;
    dw[1] = odd_a + odd_b;
    dw[2] = splat<V>(kA2) * even_a + splat<V>(kB2) * even_b + du[5];
  }
};

template <>
struct Winograd<7> {
  static constexpr int kPoints = 9, kPairs = 4;
  static constexpr double kSquares[kPairs] = {0.25 * 0.25, 0.625 * 0.625, 1.25 * 1.25, 2.0 * 2.0};
  static constexpr double kPlaces[kPairs] = {0.25, 0.625, 1.25, 2.0};

  // A square's powers from 0 on. Data, because a function may be linked from another variant's code.
  struct Powers {
    double of[kPairs][4];
  };
  static constexpr Powers powers() {
    Powers found{};
    for (int pair = 0; pair < kPairs; ++pair)
      for (int n = 0; n < 4; ++n) found.of[pair][n] = n == 0 ? 1 : found.of[pair][n - 1] * kSquares[pair];
    return found;
  }

  // The product of x - square over the squares of the other pairs: its coefficients, the highest is 1.
  struct Others {
    double c[kPairs];
  };
  static constexpr Others others(int pair) {
    Others product{{1, 0, 0, 0}};
    for (int j = 0, degree = 0; j < kPairs; ++j) {
      if (j == pair) continue;
      ++degree;
      for (int k = degree; k > 0; --k) product.c[k] = product.c[k - 1] - kSquares[j] * product.c[k];
      product.c[0] *= -kSquares[j];
    }
    return product;
  }

  static constexpr double filter(int point, int k) {
    if (point == kPoints - 1) return k == 2;
    const int pair = point / 2;
    const double place = point % 2 ? -kPlaces[pair] : kPlaces[pair];
    double divisor = 2 * place;
    for (int j = 0; j < kPairs; ++j)
      if (j != pair) divisor *= kSquares[pair] - kSquares[j];
    return (k > 0 ? place : 1) * (k > 1 ? place : 1) / divisor;
  }
  template <class V>
  static FUSEDRES_HOST_DEVICE void weights(const V (&w)[3], V (&u)[kPoints]) {
    weight_pair<0>(w, u);
    weight_pair<1>(w, u);
    weight_pair<2>(w, u);
    weight_pair<3>(w, u);
    u[8] = w[2];
  }
  template <class V>
  static FUSEDRES_HOST_DEVICE void input(const V (&d)[kPoints], V (&t)[kPoints]) {
    input_pair<0>(d, t);
    input_pair<1>(d, t);
    input_pair<2>(d, t);
    input_pair<3>(d, t);
    // All pairs' product is the last one's times x - its square.
    constexpr Others c = others(kPairs - 1);
    constexpr double square = kSquares[kPairs - 1];
    t[8] = splat<V>(-square * c.c[0]) * d[0] + splat<V>(c.c[0] - square * c.c[1]) * d[2] +
           splat<V>(c.c[1] - square * c.c[2]) * d[4] + splat<V>(c.c[2] - square) * d[6] + d[8];
  }
  template <class V>
  static FUSEDRES_HOST_DEVICE void output(const V (&m)[kPoints], V (&y)[7]) {
    V sums[kPairs], differences[kPairs];
    for (int pair = 0; pair < kPairs; ++pair) {
      sums[pair] = m[2 * pair] + m[2 * pair + 1];
      differences[pair] = splat<V>(kPlaces[pair]) * (m[2 * pair] - m[2 * pair + 1]);
    }
    constexpr Powers square = powers();
    for (int k = 0; k < 7; ++k) {
      const V(&from)[kPairs] = k % 2 ? differences : sums;
      y[k] = k == 6 ? m[8] : V{};
      for (int pair = 0; pair < kPairs; ++pair) y[k] = y[k] + splat<V>(square.of[pair][k / 2]) * from[pair];
    }
  }
  template <class V>
  static FUSEDRES_HOST_DEVICE void d_output(const V (&dy)[7], V (&dm)[kPoints]) {
#pragma GCC unroll 4
    for (int pair = 0; pair < kPairs; ++pair) {
      const V square = splat<V>(kSquares[pair]);
      const V even = dy[0] + square * (dy[2] + square * (dy[4] + square * dy[6]));
      const V odd = splat<V>(kPlaces[pair]) * (dy[1] + square * (dy[3] + square * dy[5]));
      dm[2 * pair] = even + odd;
      dm[2 * pair + 1] = even - odd;
    }
    dm[8] = dy[6];
  }
  template <class V>
  static FUSEDRES_HOST_DEVICE void d_weights(const V (&du)[kPoints], V (&dw)[3]) {
    dw[0] = dw[1] = V{};
    dw[2] = du[8];
#pragma GCC unroll 4
    for (int pair = 0; pair < kPairs; ++pair) {
      const V sum = du[2 * pair] + du[2 * pair + 1], difference = du[2 * pair] - du[2 * pair + 1];
#pragma GCC unroll 3
      for (int k = 0; k < 3; ++k) dw[k] = dw[k] + splat<V>(filter(2 * pair, k)) * (k == 1 ? sum : difference);
    }
  }

 private:
  template <int kPair, class V>
  static FUSEDRES_HOST_DEVICE void weight_pair(const V (&w)[3], V (&u)[kPoints]) {
    constexpr int kPoint = 2 * kPair;
    const V odd = splat<V>(filter(kPoint, 1)) * w[1];
    const V even = splat<V>(filter(kPoint, 0)) * w[0] + splat<V>(filter(kPoint, 2)) * w[2];
    u[kPoint] = odd + even;
    u[kPoint + 1] = odd - even;
  }
  template <int kPair, class V>
  static FUSEDRES_HOST_DEVICE void input_pair(const V (&d)[kPoints], V (&t)[kPoints]) {
    constexpr Others c = others(kPair);
    const V c0 = splat<V>(c.c[0]), c1 = splat<V>(c.c[1]), c2 = splat<V>(c.c[2]);
    const V odd = c0 * d[1] + c1 * d[3] + c2 * d[5] + d[7];
    const V even = splat<V>(kPlaces[kPair]) * (c0 * d[0] + c1 * d[2] + c2 * d[4] + d[6]);
    t[2 * kPair] = odd + even;
    t[2 * kPair + 1] = odd - even;
  }
};

}  // namespace fusedres

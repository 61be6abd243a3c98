// Winograd's minimal filtering along one dimension: kTile outputs of a window of 3 from kPoints = kTile + 2
// products, out = A^T [(G w) * (B^T d)].
//
// The tile of 4 interpolates at 0, +-5/8, +-3/2 and infinity. Powers of 5/8 and 3/2 are exact in binary, and
// these points lose half as many digits as the usual 0, +-1, +-2.
//
// dw = G^T [dm * (B^T d)] with dm = A dout: the gradient of the weights takes as few products.
#pragma once

#include "../epilogue.h"

namespace fusedres {

constexpr int kMostPoints = 6;

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

}  // namespace fusedres

// The activations of fusedres/epilogue.py: value(z), and gradient(t, dy) = dy * act'(t) of the output t = y
// where `kFromOutput`, else of the pre-activation t = z.
//
// V is float, double or a SIMD vector. It brings its operators, Splat<V> for constants and, found by
// argument-dependent lookup, select(condition, a, b), exp(V) and normal_cdf(V).
#pragma once

#include "hostdevice.h"

namespace fusedres {

// splat<V>(c): the constant c in every lane of a V; specialised beside each value type.
template <class V>
struct Splat;

template <class V>
FUSEDRES_HOST_DEVICE V splat(double c) {
  return Splat<V>::of(c);
}

struct Identity {
  static constexpr bool kFromOutput = true;

  template <class V>
  static FUSEDRES_HOST_DEVICE V value(V z) {
    return z;
  }
  template <class V>
  static FUSEDRES_HOST_DEVICE V gradient(V, V dy) {
    return dy;
  }
};

// Selects, not max() and not a product: eager keeps NaN, passes the gradient on at NaN, and a masked NaN
// becomes 0.
struct Relu {
  static constexpr bool kFromOutput = true;

  template <class V>
  static FUSEDRES_HOST_DEVICE V value(V z) {
    const V zero = splat<V>(0);
    return select(z <= zero, zero, z);
  }
  template <class V>
  static FUSEDRES_HOST_DEVICE V gradient(V y, V dy) {
    const V zero = splat<V>(0);
    return select(y <= zero, zero, dy);
  }
};

struct Relu6 {
  static constexpr bool kFromOutput = true;

  template <class V>
  static FUSEDRES_HOST_DEVICE V value(V z) {
    const V six = splat<V>(6);
    return select(z >= six, six, Relu::value(z));
  }
  template <class V>
  static FUSEDRES_HOST_DEVICE V gradient(V y, V dy) {
    return select(y >= splat<V>(6), splat<V>(0), Relu::gradient(y, dy));
  }
};

struct LeakyRelu {
  static constexpr bool kFromOutput = true;

  template <class V>
  static FUSEDRES_HOST_DEVICE V value(V z) {
    return gradient(z, z);
  }
  template <class V>
  static FUSEDRES_HOST_DEVICE V gradient(V y, V dy) {
    return select(y > splat<V>(0), dy, dy * splat<V>(0.01));
  }
};

template <class V>
FUSEDRES_HOST_DEVICE V sigmoid(V z) {
  const V one = splat<V>(1);
  return one / (one + exp(-z));
}

struct Silu {
  static constexpr bool kFromOutput = false;

  template <class V>
  static FUSEDRES_HOST_DEVICE V value(V z) {
    return z / (splat<V>(1) + exp(-z));
  }
  template <class V>
  static FUSEDRES_HOST_DEVICE V gradient(V z, V dy) {
    const V one = splat<V>(1), s = sigmoid(z);
    return dy * (s * (one + z * (one - s)));
  }
};

struct Gelu {
  static constexpr bool kFromOutput = false;

  template <class V>
  static FUSEDRES_HOST_DEVICE V value(V z) {
    return z * normal_cdf(z);
  }
  template <class V>
  static FUSEDRES_HOST_DEVICE V gradient(V z, V dy) {
    const V density = exp(z * z * splat<V>(-0.5)) * splat<V>(0.3989422804014327);
    return dy * (normal_cdf(z) + z * density);
  }
};

// 0.5 * (1 + tanh(u)) = sigmoid(2 u), which does not cancel for negative u.
struct GeluTanh {
  static constexpr bool kFromOutput = false;
  static constexpr double kTwiceScale = 2 * 0.7978845608028654;
  static constexpr double kCubic = 0.044715;

  template <class V>
  static FUSEDRES_HOST_DEVICE V gate(V z) {
    return sigmoid(splat<V>(kTwiceScale) * (z + splat<V>(kCubic) * z * z * z));
  }
  template <class V>
  static FUSEDRES_HOST_DEVICE V value(V z) {
    return z * gate(z);
  }
  template <class V>
  static FUSEDRES_HOST_DEVICE V gradient(V z, V dy) {
    const V one = splat<V>(1), s = gate(z);
    const V slope = splat<V>(kTwiceScale) * (one + splat<V>(3 * kCubic) * z * z);
    return dy * (s + z * s * (one - s) * slope);
  }
};

struct Hardswish {
  static constexpr bool kFromOutput = false;

  template <class V>
  static FUSEDRES_HOST_DEVICE V value(V z) {
    return z * Relu6::value(z + splat<V>(3)) / splat<V>(6);
  }
  template <class V>
  static FUSEDRES_HOST_DEVICE V gradient(V z, V dy) {
    const V three = splat<V>(3), one = splat<V>(1);
    const V inner = select(z <= three, z / three + splat<V>(0.5), one);
    return dy * select(z < -three, splat<V>(0), inner);
  }
};

// X(struct, name, code), in the order of the Python catalogue.
#define FUSEDRES_ACTIVATIONS(X) \
  X(Identity, identity, 0)      \
  X(Relu, relu, 1)              \
  X(Relu6, relu6, 2)            \
  X(LeakyRelu, leaky_relu, 3)   \
  X(Silu, silu, 4)              \
  X(Gelu, gelu, 5)              \
  X(GeluTanh, gelu_tanh, 6)     \
  X(Hardswish, hardswish, 7)

enum class Act : int {
#define FUSEDRES_ACT_CODE(Struct, name, code) k##Struct = code,
  FUSEDRES_ACTIVATIONS(FUSEDRES_ACT_CODE)
#undef FUSEDRES_ACT_CODE
};

// z = (x - mean) * scale + shift. The mean first: x * scale + shift cancels when |mean| >> std.
template <class V>
FUSEDRES_HOST_DEVICE V affine(V x, V mean, V scale, V shift) {
  return (x - mean) * scale + shift;
}

// dx = a * g + b * (x - mean) + d, the gradient of a batch norm whose statistics come from the batch.
template <class V>
FUSEDRES_HOST_DEVICE V norm_gradient(V g, V x, V mean, V a, V b, V d) {
  return a * g + (b * (x - mean) + d);
}

}  // namespace fusedres

// The passes over memory of which the ops consist, for one instruction set.
#pragma once

#include "walk.h"

namespace fusedres::FUSEDRES_ISA {

// t -> (t - mean) * scale + shift
struct Affine {
  const void* mean;   // (C,) A
  const void* scale;  // (C,) A; with a gate folded in (N, C)
  const void* shift;  // (C,) A; with a gate folded in (N, C)
};

// y = act(x_affine(x) + r_affine(r)), one pass, one rounding.
// Reads x and r, writes y and, where kept, one bit an element.
struct Apply {
  Shape shape;
  DType dtype;
  Act act;
  const void* x;  // (N, C, S) T
  const void* r;  // (N, C, S) T, or null
  Affine x_affine;
  Affine r_affine;       // all null: r as it is
  int64_t image_stride;  // C where a gate is folded into x_affine, else 0
  void* y;               // (N, C, S) T
  uint8_t* mask;         // bits of !(y <= 0), or null
};
void apply(const Apply& pass);

// y = the largest act(x_affine(x)) of every window, rounded to T before they are compared; which one.
// Reads x, writes y and choice.
struct PoolApply {
  Shape shape;
  DType dtype;
  Act act;        // ReLU or the identity
  const void* x;  // (N, C, S) T
  Affine x_affine;
  Pool pool;
  void* y;          // (N, C, S') T
  uint8_t* choice;  // (N, C, S'), or null
};
void pool_apply(const PoolApply& pass);

// Each part's mean and sum of (x - mean)^2, per channel. Reads x.
struct PartStatistics {
  Shape shape;
  DType dtype;
  const void* x;  // (N, C, S) T
  Parts parts;
  void* pivot;   // (P, C) A, scratch
  double* mean;  // (P, C)
  double* m2;    // (P, C)
};
void part_statistics(const PartStatistics& pass);

// Where g = dy * act'(z) comes from.
struct Slope {
  Act act;
  const void* dy;  // (N, C, S) T
  const void* y;  // (N, C, S) T: for activations whose output tells the slope, unless a mask or ReLU's z does
  const uint8_t* mask;  // bits of !(y <= 0), or null
  const void* x;        // (N, C, S) T, or null
  const void* r;        // (N, C, S) T, or null
  Affine x_affine;      // the forward's: z is recomputed for the other activations
  Affine r_affine;
  int64_t image_stride;
  const uint8_t* choice;  // (N, C, S'): then dy is (N, C, S') as well, and g sums what of it each place gets
  Pool pool;
};

// Each part's sums of g, g * (x - mean) and g * (r - mean_r), per channel. Reads dy, what g needs, x and r.
struct GradientSums {
  Shape shape;
  DType dtype;
  Slope slope;
  Parts parts;
  double* g;    // (P, C)
  double* g_x;  // (P, C), or null
  double* g_r;  // (P, C), or null
};
void gradient_sums(const GradientSums& pass);
void pool_gradient_sums(const GradientSums& pass);  // with slope.choice

// t's gradient a * g + b * (t - mean) + d.
struct OperandGradient {
  void* gradient;  // (N, C, S) T; null: not wanted
  const void* a;   // (C,) A, x's with a gate folded in (N, C); null: 1
  const void* b;   // (C,) A; null: 0, and d as well
  const void* d;   // (C,) A
};

// dx and dr. Reads dy, what g needs, x and r, writes dx and dr.
struct GradientApply {
  Shape shape;
  DType dtype;
  Slope slope;
  OperandGradient x;
  OperandGradient r;
};
void gradient_apply(const GradientApply& pass);
void pool_gradient_apply(const GradientApply& pass);  // with slope.choice

// f(T{}) for a data type that this instruction set's variant is compiled for; isa.cpp asks for no other.
template <class F>
FUSEDRES_INLINE void with_type(DType dtype, const F& f) {
#if !defined(__AVX512BF16__)
  if (dtype == DType::kFloat32) return f(float{});
  if (dtype == DType::kFloat16) return f(Half{});
#endif
#if !defined(__AVX2__)
  if (dtype == DType::kFloat64) return f(double{});
#endif
  if (dtype == DType::kBFloat16) return f(BFloat16{});
  __builtin_unreachable();
}

template <Order order>
struct OrderTag {
  static constexpr Order kOrder = order;
};

template <class F>
FUSEDRES_INLINE void with_order(Order order, const F& f) {
  if (order == Order::kPixels) return f(OrderTag<Order::kPixels>{});
  f(OrderTag<Order::kPlanes>{});
}

// Outputs from this size on bypass the caches. Measured with 32 MiB of cache: the op alone is faster so from
// 1 MB on, by 1.9 at 13 MB; with whoever reads the output next slower by 1.3 up to 6 MB, and faster from 13
// MB on.
constexpr int64_t kStreamBytes = int64_t{8} << 20;

// Whether a pass should stream its output: it is large, and every vector of every row lies on a multiple of
// its size. Where two of them are a cache line, a row's first and last lines may be written by halves.
template <class T>
FUSEDRES_INLINE bool streams(const Shape& shape, const void* output) {
  constexpr int64_t kVector = VecOf<T>::kLanes * int64_t{sizeof(T)};
  const int64_t row = (shape.order == Order::kPixels ? shape.channels : shape.pixels) * int64_t{sizeof(T)};
  return shape.elements() * int64_t{sizeof(T)} >= kStreamBytes && row % kVector == 0 &&
         reinterpret_cast<uintptr_t>(output) % kVector == 0;
}

// Asks for what a pass reads two pages later, into the second-level cache: at the end of a page the hardware
// stops running ahead. Measured on tensors beyond the caches: 1.2 to 1.4 times as fast.
constexpr uintptr_t kAheadBytes = 8192;

FUSEDRES_INLINE void prefetch_pages(const void* p) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + kAheadBytes), 0, 2);
}

template <class T>
FUSEDRES_INLINE void write(T* p, VecOf<T> v, FirstLanes lanes, bool) {
  store(p, v, lanes);
}
template <class T>
FUSEDRES_INLINE void write(T* p, VecOf<T> v, AllLanes, bool past_caches) {
  if (past_caches) return stream(p, v);
  store(p, v);
}

}  // namespace fusedres::FUSEDRES_ISA

// What the forms of conv_dweight share: dweight is a sum over steps of products of what of dy and of x a step
// has, at each of some points.
#pragma once

#include "conv_product.h"
#include "conv_weights.h"
#include "walk.h"

namespace fusedres::FUSEDRES_ISA {

constexpr int64_t kPanel = ConvWeights::kPanel;
constexpr int64_t kGap = 16;  // between arrays that shall not fall on each other in the cache

// Rows of dweight at a time, and vectors of a row: their sums stay in registers.
#if defined(__AVX512F__)
constexpr int kSumRows = 8;
#elif defined(__AVX2__)
constexpr int kSumRows = 4;
#else
constexpr int kSumRows = 2;
#endif
constexpr int kSumVectors = 2;
constexpr int64_t kSumColumns = kSumVectors * Vec<float>::kLanes;

// One of multiply's operands, from some channel and step on.
template <class T>
struct Steps {
  const T* begin;
  int64_t step;   // from a step to the next one
  int64_t apart;  // from a vector to the next one; where there is none, the same again
};

// Values of some steps, as Product takes them: (points, panels, steps, kPanel, inputs of a step), or with a
// step's panels side by side.
template <class T>
struct Panels {
  static constexpr int64_t kInputs = Product<T>::kInputs, kWidth = kPanel * kInputs;

  int64_t channels;
  int64_t steps;
  bool side_by_side;
  T* begin;

  int64_t count() const { return ceil_div(channels, kPanel); }
  int64_t panel() const { return side_by_side ? kWidth : steps * kWidth + kGap; }
  int64_t step() const { return side_by_side ? count() * kWidth : kWidth; }
  int64_t point() const { return count() * (steps * kWidth + kGap); }
  T* at(int64_t of_point, int64_t channel, int64_t of_step) const {
    return begin + of_point * point() + channel / kPanel * panel() + of_step * step() +
           channel % kPanel * kInputs;
  }
  Steps<T> from(int64_t of_point, int64_t channel, int64_t of_step) const {
    constexpr int64_t kLanes = Vec<float>::kLanes;
    const int64_t next = channels - channel > kPanel ? panel() : 0;
    return {at(of_point, channel, of_step), step(), kLanes < kPanel ? kLanes * kInputs : next};
  }
};

// finish(row, v, sum) with sum[lane] = the sum over steps of dy[step][row] * x[step][lane] for vector v of x.
// Between two steps there is time for `meanwhile(step)`.
template <class T, class Meanwhile, class Finish>
FUSEDRES_INLINE void multiply(const Steps<T>& dy, const Steps<T>& x, int64_t steps,
                              const Meanwhile& meanwhile, const Finish& finish) {
  using P = Product<T>;
  Vec<float> sum[kSumRows][kSumVectors] = {};
  const T *dy_at = dy.begin, *x_at = x.begin;
  for (int64_t step = 0; step < steps; ++step, dy_at += dy.step, x_at += x.step) {
    meanwhile(step);
#pragma GCC unroll 2
    for (int part = 0; part < P::kParts; ++part) {
      typename P::Operand values[kSumVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kSumVectors; ++v) values[v] = P::weights(x_at + v * x.apart, part);
#pragma GCC unroll 8
      for (int row = 0; row < kSumRows; ++row) {
        const typename P::Operand slope = P::values(dy_at + row * P::kInputs, part);
#pragma GCC unroll 2
        for (int v = 0; v < kSumVectors; ++v) sum[row][v] = P::add(sum[row][v], slope, values[v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < kSumRows; ++row)
#pragma GCC unroll 2
    for (int v = 0; v < kSumVectors; ++v) finish(row, v, sum[row][v]);
}

// Whether dweight is finite.
bool conv_dweight_winograd(const ConvDweight& op);

}  // namespace fusedres::FUSEDRES_ISA

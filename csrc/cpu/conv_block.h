// The matrix product at the heart of conv_act: rows that lie anywhere in memory times a block of packed
// weights.
#pragma once

#include "conv_product.h"
#include "conv_weights.h"
#include "walk.h"

namespace fusedres::FUSEDRES_ISA {

// Rows are taken this many at a time, so that their sums fill the registers; a table of rows is filled up to
// a multiple of it.
#if defined(FUSEDRES_TILES)
constexpr int kRows = 32;
#elif defined(__AVX512F__)
constexpr int kRows = 12;
#elif defined(__AVX2__)
constexpr int kRows = 6;
#else
constexpr int kRows = 2;
#endif

// Row r is the values [begin[tap * pitch + r] + offset, ... + run) of every tap in turn.
template <class T>
struct ConvRows {
  const Value<T>* const* begin;
  int64_t pitch;
  int64_t offset;
  int64_t taps;
  int64_t run;
  const T* next_weights = nullptr;  // as many again, which come into the cache meanwhile; or null
  bool cold = false;                // not yet in the second-level cache: the next rows come meanwhile
  int64_t bundle = 0;               // every output has inputs of its own: its group's, of so many channels
};

// y = act(sum * scale + bias + residual), for the first `channels` of the block.
template <class T>
struct ConvResult {
  const float* bias;  // or null
  const T* residual;  // (rows, stride), or null; may be y
  T* y;               // (rows, stride)
  int64_t stride;
  int64_t channels;
  Act act;
  const float* scale = nullptr;  // or null
};

// y[r] for `count` rows. A row's sums are the same bits whatever its neighbours are. The tile unit takes 16
// rows from 0, 16, ... on at equal distances, and runs of whole tiles. `weights` (taps, steps, width, inputs
// of a step), from cache as often as there are kRows rows.
template <class T>
void conv_block(const ConvRows<T>& rows, const T* weights, int64_t width, const ConvResult<T>& to,
                int64_t count);

// Of z, the products' sum, all but the activation; `channel` is its first lane's.
template <class T, class Lanes>
FUSEDRES_INLINE Vec<float> conv_epilogue(Vec<float> z, const ConvResult<T>& to, int64_t row, int64_t channel,
                                         Lanes lanes) {
  if (to.scale) z = z * load(to.scale + channel, lanes);
  if (to.bias) z = z + load(to.bias + channel, lanes);
  if (to.residual) z = z + load(to.residual + row * to.stride + channel, lanes);
  return z;
}

}  // namespace fusedres::FUSEDRES_ISA

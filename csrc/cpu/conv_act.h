// conv_act's forms for one instruction set.
#pragma once

#include "conv_block.h"

namespace fusedres::FUSEDRES_ISA {

inline ConvWeights weights_of(const ConvAct& op) {
  return {op.dtype,          op.groups, op.inputs / op.groups, op.outputs / op.groups, op.rows.kernel,
          op.columns.kernel, op.tile};
}

// The result of a block of channels of y's pixels from `pixel` on.
template <class T>
ConvResult<T> result_of(const ConvAct& op, int64_t pixel, int64_t group, int64_t block) {
  const int64_t outputs = op.outputs / op.groups, within = block * ConvWeights::kWidth;
  const int64_t channel = group * outputs + within, at = pixel * op.outputs + channel;
  return {op.bias ? op.bias + channel : nullptr,
          op.residual ? static_cast<const T*>(op.residual) + at : nullptr,
          static_cast<T*>(op.y) + at,
          op.outputs,
          minimum(ConvWeights::kWidth, outputs - within),
          static_cast<Act>(op.act),
          op.scale ? op.scale + channel : nullptr};
}

// Neighbouring pixels of y, across rows and images, and where the windows' values lie that they are made of.
//
// Windows are read where they are. Beyond the border there is a row of zeros to read instead, and where it
// doesn't pay to go value by value of the window, or x's pixels would fall on each other in the cache, a
// copy.
template <class T>
class ConvTile {
 public:
  ConvTile(const ConvAct& op, int64_t most_pixels, Arena& arena);

  void place(int64_t pixel, int64_t count);
  // y's block of channels; meanwhile the next block's weights come into the cache.
  void compute(int64_t group, int64_t block, const T* weights, const T* next_weights = nullptr) const;

 private:
  void align_rows();
  const T* widened(const T* weights, int64_t width) const;
  void place_row(const T* image, int64_t row, int64_t begin, int64_t end, const T** to);
  void place_window(const T* image, int64_t row, int64_t column, const T** to);
  const T* tap(const T* x_row, int64_t column, int64_t slot) const;

  const ConvAct& op_;
  const ConvWeights weights_;
  const bool flat_;  // a tap is a row of the window, not a value of it
  const bool copied_;
  const int64_t taps_;
  const int64_t run_;      // of a tap
  const int64_t aligned_;  // the same in whole steps of the unit that multiplies
  const int64_t pitch_;
  const T** begin_;  // (taps, pitch)
  T* zeros_;
  T* copies_;   // (taps, pitch, run and a little), or null
  T* widened_;  // a block's weights (taps, steps of an aligned run, width, inputs of a step), or null
  int64_t pixel_ = 0;
  int64_t count_ = 0;
};

template <class T>
void conv_direct(const ConvAct& op);
template <class T>
void conv_winograd(const ConvAct& op);

}  // namespace fusedres::FUSEDRES_ISA

// conv_act's forms for one instruction set.
#pragma once

#include <type_traits>

#include "conv_widened.h"

namespace fusedres::FUSEDRES_ISA {

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
  // y's block of channels; meanwhile the next block's weights come into the cache, and the next rows of x if
  // they are cold.
  void compute(int64_t group, int64_t block, const T* weights, const T* next_weights = nullptr,
               bool cold = false) const;

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
  const TileProducts<T> products_;
  int64_t pixel_ = 0;
  int64_t count_ = 0;
};

// Where the products take x as it is, and where they don't.
template <class T>
using TileOf = std::conditional_t<kWidens<T>, WidenedTile<T>, ConvTile<T>>;

template <class T>
void conv_direct(const ConvAct& op);
template <class T>
void conv_winograd(const ConvAct& op);

}  // namespace fusedres::FUSEDRES_ISA

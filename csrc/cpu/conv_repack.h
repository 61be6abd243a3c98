// Weights of a training step in the products' order: read from wherever they lie, and transformed, anew in
// every call.
#pragma once

#include <type_traits>

#include "conv_product.h"
#include "conv_weights.h"
#include "walk.h"
#include "winograd.h"

namespace fusedres::FUSEDRES_ISA {

// A weight of one group, and how it is to be packed.
struct RawWeights {
  ConvWeights shape;
  PlainWeight plain;

  int64_t place(int64_t output, int64_t input, int64_t row, int64_t column) const {
    const int64_t* const strides = plain.strides;
    return output * strides[0] + input * strides[1] + row * strides[2] + column * strides[3];
  }
};

// Words of a run's steps for every lane of a vector: one float32, or two bfloat16 with the first in the lower
// half.
template <class T>
struct StepWords {
  static constexpr int64_t kInputs = Product<T>::kInputs;
  static constexpr int kLanes = Vec<float>::kLanes;
  static constexpr int64_t kTransposed = kLanes * kInputs;  // values of kLanes words

  const T* begin;  // of the first lane
  int64_t lane;    // from a lane to the next one
  int64_t value;   // from a value to the next one
  int64_t lanes;   // that there are: the others are 0
  int64_t values;

  // to <- words [0, ceil(values / kInputs)) of the vector, `pitch` words apart.
  void copy(uint32_t* to, int64_t pitch) const {
    int64_t first = 0;
#if defined(__AVX512F__)
    if (value == 1 && lanes >= kLanes)
      for (; first + kTransposed <= values; first += kTransposed, to += kLanes * pitch)
        transpose(first, to, pitch);
#endif
    for (; first < values; first += kInputs, to += pitch) {
      if (lane == 1 && lanes >= kLanes)
        store_word(to, across(first));
      else
        for (int64_t i = 0; i < kLanes; ++i) {
          const uint32_t found = i < lanes ? word(i, first) : 0;
          __builtin_memcpy(to + i, &found, sizeof found);  // packed weights may lie at any value
        }
    }
  }

 private:
  uint32_t word(int64_t of_lane, int64_t first) const {
    const T* const at = begin + of_lane * lane + first * value;
    if constexpr (kInputs == 1)
      return bit_cast<uint32_t>(*at);
    else
      return at->bits | (first + 1 < values ? uint32_t{at[value].bits} << 16 : 0);
  }

  static void store_word(uint32_t* to, Words words) { __builtin_memcpy(to, &words, sizeof words); }

  // Neighbouring lanes.
  Words across(int64_t first) const {
    const T* const at = begin + first * value;
    const Words one = bit_cast<Words>(load(at, AllLanes{}).v);
    if constexpr (kInputs == 1)
      return one;
    else
      return one >> 16 | (first + 1 < values ? bit_cast<Words>(load(at + value, AllLanes{}).v) : Words{});
  }

#if defined(__AVX512F__)
  // Neighbouring values: a shuffle of 16 cards four times over turns rows into columns.
  void transpose(int64_t first, uint32_t* to, int64_t pitch) const {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    __m512i rows[kLanes], shuffled[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = _mm512_loadu_si512(begin + i * lane + first);
#pragma GCC unroll 4
    for (int turn = 0; turn < 4; ++turn) {
#pragma GCC unroll 8
      for (int i = 0; i < kLanes / 2; ++i) {
        shuffled[2 * i] = _mm512_permutex2var_epi32(rows[i], low, rows[i + kLanes / 2]);
        shuffled[2 * i + 1] = _mm512_permutex2var_epi32(rows[i], high, rows[i + kLanes / 2]);
      }
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) rows[i] = shuffled[i];
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) _mm512_storeu_si512(to + i * pitch, rows[i]);
  }
#endif
};

// What StepWords<BFloat16> of these values are.
inline void copy_rounded(const StepWords<float>& from, uint32_t* to, int64_t pitch) {
  constexpr int kLanes = Vec<float>::kLanes;
  constexpr int64_t kRun = 64;
  alignas(64) BFloat16 run[kLanes * kRun];
  const int64_t lanes = minimum<int64_t>(from.lanes, kLanes);
  auto copy = [](const float* begin, int64_t count, BFloat16* to) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(to + i, load(begin + i, AllLanes{}));
    if (i < count) store(to + i, load(begin + i, FirstLanes{static_cast<int>(count - i)}), AllLanes{});
  };
  for (int64_t first = 0; first < from.values; first += kRun, to += kRun / 2 * pitch) {
    const float* const begin = from.begin + first * from.value;
    const int64_t values = minimum(kRun, from.values - first);
    StepWords<BFloat16> words{run, 1, kLanes, from.lanes, values};
    if (from.value == 1) {
      for (int64_t i = 0; i < lanes; ++i) copy(begin + i * from.lane, values, run + i * kRun);
      words.lane = kRun;
      words.value = 1;
    } else if (from.lane == 1) {
      for (int64_t k = 0; k < values; ++k) copy(begin + k * from.value, lanes, run + k * kLanes);
    } else {
      for (int64_t k = 0; k < values; ++k)
        for (int64_t i = 0; i < lanes; ++i)
          run[k * kLanes + i] = narrow_to_bfloat16(begin[k * from.value + i * from.lane]);
    }
    words.copy(to, pitch);
  }
}

// `values` of a run from `first` on, in one vector of a block's lanes: StepWords::copy.
template <class T>
void copy_words(const RawWeights& from, int64_t channel, int64_t row, int64_t column, int64_t first,
                int64_t values, uint32_t* to, int64_t pitch) {
  const PlainWeight& plain = from.plain;
  const int64_t begin = from.place(channel, first, row, column);
  auto words = [&](auto* data) {
    return StepWords<std::remove_const_t<std::remove_pointer_t<decltype(data)>>>{
        data + begin, plain.strides[0], plain.strides[1], from.shape.outputs - channel, values};
  };
  if constexpr (sizeof(T) < sizeof(float))
    if (plain.dtype == DType::kFloat32)
      return copy_rounded(words(static_cast<const float*>(plain.begin)), to, pitch);
  words(static_cast<const T*>(plain.begin)).copy(to, pitch);
}

// Value k of a row of the window.
template <class T>
T flat_value(const RawWeights& from, int64_t output, int64_t row, int64_t k) {
  const ConvWeights& shape = from.shape;
  if (output >= shape.outputs || k >= shape.run()) return T{};
  const int64_t place = from.place(output, k % shape.inputs, row, k / shape.inputs);
  if constexpr (sizeof(T) < sizeof(float))
    if (from.plain.dtype == DType::kFloat32)
      return narrow_to_bfloat16(static_cast<const float*>(from.plain.begin)[place]);
  return static_cast<const T*>(from.plain.begin)[place];
}

// Of a block's direct form at `to` the steps that `count` inputs are in; all of them where a tap is a row of
// the window.
template <class T>
void pack_block(const RawWeights& from, int64_t block, int64_t first, int64_t count, T* to) {
  constexpr int kLanes = Vec<float>::kLanes;
  const ConvWeights& shape = from.shape;
  const int64_t width = shape.width(block), channel = block * ConvWeights::kWidth;
  if (shape.flat()) {
    for (int64_t row = 0; row < shape.rows; ++row)
      for (int64_t k = 0; k < shape.steps() * shape.step(); k += shape.step())
        for (int64_t lane = 0; lane < width; ++lane)
          for (int64_t i = k; i < k + shape.step(); ++i) *to++ = flat_value<T>(from, channel + lane, row, i);
    return;
  }
  for (int64_t tap = 0; tap < shape.taps(); ++tap)
    for (int64_t lane = 0; lane < width; lane += kLanes) {
      T* const at = to + (tap * shape.steps() * shape.step() + first) * width + lane * shape.step();
      copy_words<T>(from, channel + lane, tap / shape.columns, tap % shape.columns, first, count,
                    reinterpret_cast<uint32_t*>(at), width);
    }
}

// Winograd's form of a block's weights, some inputs and one row of points at a time.
template <class T, int kTile>
class FreshPoints {
  using W = Winograd<kTile>;
  static constexpr int kTaps = 3, kSide = W::kPoints;
  static constexpr int kLanes = Vec<float>::kLanes;
  static constexpr int64_t kWidth = ConvWeights::kWidth, kInputs = 64;
  // From one tap's values to the next one's, and from one point's.
  static constexpr int64_t kApart = kInputs * kWidth + 16;

 public:
  static constexpr bool kFresh = true;

  FreshPoints(const RawWeights& from, Arena& arena)
      : from_(from),
        words_(arena.take<uint32_t>(kInputs * kLanes)),
        values_(arena.take<float>(kTaps * kTaps * kApart)),
        row_(arena.take<float>(kSide * kApart)) {}

  int64_t most_inputs() const { return kInputs; }
  int64_t apart() const { return kApart; }

  void place(int64_t block, int64_t first, int64_t count) {
    const int64_t width = from_.shape.width(block);
    size_ = count * width;
    for (int64_t tap = 0; tap < kTaps * kTaps; ++tap)
      for (int64_t lane = 0; lane < width; lane += kLanes) {
        copy_words<T>(from_, block * kWidth + lane, tap / kTaps, tap % kTaps, first, count, words_, kLanes);
        widen_words(values_ + tap * kApart + lane, count, width);
      }
  }

  // Points (row, 0), (row, 1), ... of what was placed: (inputs, width) each.
  const float* row(int row) const {
    Vec<float> filter[kTaps];
    for (int k = 0; k < kTaps; ++k) filter[k] = broadcast(static_cast<float>(W::filter(row, k)));
    for (int64_t at = 0; at < size_; at += kLanes) {
      Vec<float> half[kTaps], u[kSide];
#pragma GCC unroll 3
      for (int column = 0; column < kTaps; ++column) {
        const float* const w = values_ + column * kApart + at;
        half[column] = filter[0] * load(w, AllLanes{});
#pragma GCC unroll 2
        for (int k = 1; k < kTaps; ++k)
          half[column] = multiply_add(filter[k], load(w + k * kTaps * kApart, AllLanes{}), half[column]);
      }
      W::weights(half, u);
#pragma GCC unroll 9
      for (int j = 0; j < kSide; ++j) store(row_ + j * kApart + at, u[j]);
    }
    return row_;
  }

  // The direct form of a block.
  const T* direct(int64_t block, Arena& arena) const {
    T* const to = arena.take<T>(kWidth * from_.shape.depth());
    pack_block(from_, block, 0, from_.shape.inputs, to);
    return to;
  }

 private:
  void widen_words(float* to, int64_t count, int64_t width) const {
    constexpr int64_t kStep = Product<T>::kInputs;
    for (int64_t i = 0; i < count; i += kStep, to += kStep * width) {
      Words words;
      __builtin_memcpy(&words, words_ + i / kStep * kLanes, sizeof words);
      if constexpr (kStep > 1) {
        if (i + 1 < count) store(to + width, floats(words & 0xffff0000u));
        words = words << 16;
      }
      store(to, floats(words));
    }
  }
  static Vec<float> floats(Words words) { return {bit_cast<Vec<float>::Native>(words)}; }

  const RawWeights from_;
  uint32_t* const words_;  // (steps, a vector's lanes)
  float* const values_;    // (taps, inputs, width)
  float* const row_;       // (points of a row, inputs, width)
  int64_t size_ = 0;       // of a point
};

}  // namespace fusedres::FUSEDRES_ISA

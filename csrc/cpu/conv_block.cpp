#include "conv_block.h"

#include <type_traits>

#include "activation.h"

namespace fusedres::FUSEDRES_ISA {
namespace {

constexpr int kLanes = Vec<float>::kLanes;
constexpr int64_t kLineBytes = 64;

// Where the registers hold no full result: sums from memory, any activation, any number of channels.
template <class T>
__attribute__((noinline)) void finish_from_memory(const Vec<float>* sums, int64_t vectors,
                                                  const ConvResult<T>& to, int64_t rows) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t channel = 0; channel < to.channels; channel += kLanes) {
      const Vec<float> sum = sums[row * vectors + channel / kLanes];
      T* const y = to.y + row * to.stride + channel;
      auto finish = [&](auto lanes) FUSEDRES_INLINE_LAMBDA {
        store(y, activate(to.act, conv_epilogue(sum, to, row, channel, lanes)), lanes);
      };
      if (channel + kLanes <= to.channels)
        finish(AllLanes{});
      else
        finish(FirstLanes{static_cast<int>(to.channels - channel)});
    }
}

// Two vectors side by side.
template <class T>
FUSEDRES_INLINE void store_pair(T* y, Vec<float> first, Vec<float> second) {
#if defined(__AVX512BF16__)
  // Both in one instruction, which takes denormals for 0: those are left to store.
  constexpr int kDenormal = 0x20;
  if constexpr (sizeof(T) == sizeof(BFloat16)) {
    const auto denormal =
        _mm512_fpclass_ps_mask(first.v, kDenormal) | _mm512_fpclass_ps_mask(second.v, kDenormal);
    if (__builtin_expect(denormal == 0, 1)) {
      const __m512bh both = _mm512_cvtne2ps_pbh(second.v, first.v);
      __builtin_memcpy(y, &both, sizeof both);
      return;
    }
  }
#endif
  store(y, first);
  store(y + kLanes, second);
}

// y of the first rows; `value(row, v)` gives its vectors.
template <int kCount, int kVectors, class T, class Value>
FUSEDRES_INLINE void store_rows(const ConvResult<T>& to, int64_t rows, const Value& value) {
  const int64_t stride = to.stride;
  T* y = to.y;
#pragma GCC unroll 16
  for (int row = 0; row < kCount; ++row, y += stride) {
    if (row == rows) return;
    if constexpr (kVectors == 2)
      store_pair(y, value(row, 0), value(row, 1));
    else
      store(y, value(row, 0));
  }
}

template <class T, int kCount, int kVectors>
FUSEDRES_INLINE void finish(const Vec<float> (&sums)[kCount][kVectors], const ConvResult<T>& to,
                            int64_t rows) {
  if (to.channels < kVectors * kLanes || (to.act != Act::kIdentity && to.act != Act::kRelu)) {
    Vec<float> kept[kCount][kVectors];
#pragma GCC unroll 16
    for (int row = 0; row < kCount; ++row)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) kept[row][v] = sums[row][v];
    return finish_from_memory(&kept[0][0], kVectors, to, rows);
  }
  if (!to.scale && !to.bias && !to.residual && to.act == Act::kIdentity)
    return store_rows<kCount, kVectors>(to, rows,
                                        [&](int row, int v) FUSEDRES_INLINE_LAMBDA { return sums[row][v]; });
  // conv_epilogue without a question for each vector: sum * 1 + -0 is the sum, and nothing is below
  // -infinity.
  Vec<float> scale[kVectors], bias[kVectors];
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    scale[v] = to.scale ? load(to.scale + v * kLanes, AllLanes{}) : broadcast(1.0f);
    bias[v] = to.bias ? load(to.bias + v * kLanes, AllLanes{}) : broadcast(-0.0f);
  }
  const Vec<float> floor = broadcast(to.act == Act::kRelu ? 0.0f : -__builtin_inff());
  auto activated = [&](Vec<float> z) FUSEDRES_INLINE_LAMBDA { return select(z <= floor, floor, z); };
  auto sum = [&](int row, int v)
                 FUSEDRES_INLINE_LAMBDA { return multiply_add(sums[row][v], scale[v], bias[v]); };
  if (!to.residual)
    return store_rows<kCount, kVectors>(
        to, rows, [&](int row, int v) FUSEDRES_INLINE_LAMBDA { return activated(sum(row, v)); });
  store_rows<kCount, kVectors>(to, rows, [&](int row, int v) FUSEDRES_INLINE_LAMBDA {
    return activated(sum(row, v) + load(to.residual + row * to.stride + v * kLanes, AllLanes{}));
  });
}

template <class T>
FUSEDRES_INLINE void prefetch_result(const ConvResult<T>& to, int64_t row, int64_t channel) {
  __builtin_prefetch(to.y + row * to.stride + channel, 1);
  if (to.residual) __builtin_prefetch(to.residual + row * to.stride + channel);
}

// One step of every row's sums; `value(row, part)` gives what of x it multiplies. Meanwhile the weights of a
// later step come into the first-level cache.
template <class T, int kCount, int kVectors, class Value>
FUSEDRES_INLINE void step(Vec<float> (&sums)[kCount][kVectors], const T* weights, int64_t width,
                          const Value& value) {
  using P = Product<T>;
  constexpr int64_t kStepsAhead = 8, kLine = kLineBytes / int64_t{sizeof(T)};
  for (int64_t i = 0; i < kVectors * kLanes * P::kInputs; i += kLine)
    __builtin_prefetch(weights + kStepsAhead * width * P::kInputs + i);
#pragma GCC unroll 2
  for (int part = 0; part < P::kParts; ++part) {
    typename P::Operand w[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) w[v] = P::weights(weights + v * kLanes * P::kInputs, part);
#pragma GCC unroll 16
    for (int row = 0; row < kCount; ++row) {
      const typename P::Operand x = value(row, part);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sums[row][v] = P::add(sums[row][v], x, w[v]);
    }
  }
}

// What of the next weights a group of rows fetches: some lines of as many as it reads itself.
template <class T>
struct Ahead {
  const T* weights;  // or null
  int64_t lines;
};

// y of the `rows` first of kCount rows; meanwhile what the result, the next rows and the next block need
// comes into the cache. A step of k loads kVectors vectors and kCount values for kCount * kVectors
// multiply-adds.
template <int kCount, int kVectors, class T>
void multiply(const ConvRows<T>& from, const T* weights, int64_t block_width, const ConvResult<T>& to,
              int64_t rows, Ahead<T> ahead) {
  using P = Product<T>;
  // Known where a block is as wide as the vectors: a register more for the rows.
  const int64_t width = 2 * kLanes == ConvWeights::kWidth ? kVectors * kLanes : block_width;
  constexpr int64_t kLine = kLineBytes / int64_t{sizeof(T)};
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t channel = 0; channel < kVectors * kLanes; channel += kLine)
      prefetch_result(to, row, channel);
  Vec<float> sums[kCount][kVectors] = {};
  const int64_t whole = from.run / P::kInputs * P::kInputs;
  for (int64_t tap = 0; tap < from.taps; ++tap) {
    const Value<T>* x[kCount];
#pragma GCC unroll 16
    for (int row = 0; row < kCount; ++row) x[row] = from.begin[tap * from.pitch + row] + from.offset;
    const Value<T>* const* const next = from.begin + tap * from.pitch + kCount;
    for (int64_t k = 0; k < whole;) {
      if (from.cold)
#pragma GCC unroll 16
        for (int row = 0; row < kCount; ++row)
          for (int64_t i = 0; i < kLine; i += kLineBytes / int64_t{sizeof(Value<T>)})
            __builtin_prefetch(next[row] + from.offset + k + i);
      if (ahead.weights) {
        for (int64_t i = 0; i < ahead.lines; ++i) __builtin_prefetch(ahead.weights + i * kLine);
        ahead.weights += width * kLine;
      }
      for (const int64_t end = minimum(k + kLine, whole); k < end;
           k += P::kInputs, weights += width * P::kInputs)
        step<T>(sums, weights, width,
                [&](int row, int part) FUSEDRES_INLINE_LAMBDA { return P::values(x[row] + k, part); });
    }
    if constexpr (P::kInputs > 1) {
      if (whole == from.run) continue;
      step<T>(sums, weights, width,
              [&](int row, int part) FUSEDRES_INLINE_LAMBDA { return P::last(x[row] + whole, part); });
      weights += width * P::kInputs;
    }
  }
  finish(sums, to, rows);
}

// The same of a bundle, of one vector of outputs: what they read of x lies beside one another, each group's
// inputs where its outputs are. They stay in registers.
template <int kCount, bool kWhole, class T>
void multiply_bundle(const ConvRows<T>& from, const T* weights, int64_t width, const ConvResult<T>& to,
                     int64_t rows) {
  using P = Product<T>;
  const int bundle = static_cast<int>(from.bundle), channels = static_cast<int>(to.channels);
  LaneNumbers first;  // by lane, its group's; a bundle is a power of 2
  for (int lane = 0; lane < kLanes; ++lane) first[lane] = lane & -bundle;
  Vec<float> sums[kCount][1] = {};
  for (int64_t tap = 0; tap < from.taps; ++tap) {
    Vec<float> x[kCount];
#pragma GCC unroll 16
    for (int row = 0; row < kCount; ++row) {
      const float* const values = from.begin[tap * from.pitch + row] + from.offset;
      if constexpr (kWhole)
        x[row] = load(values, AllLanes{});
      else
        x[row] = load(values, FirstLanes{channels});
    }
    for (int k = 0; k < bundle; k += P::kInputs, weights += width * P::kInputs)
      for (int part = 0; part < P::kParts && k + part < bundle; ++part) {
        const typename P::Operand w = P::weights(weights, part);
        const LaneNumbers own = first + (k + part);
#pragma GCC unroll 16
        for (int row = 0; row < kCount; ++row) sums[row][0] = P::add(sums[row][0], shuffle(x[row], own), w);
      }
  }
  finish(sums, to, rows);
}

enum class Reads { kShared, kOwn, kOwnOfFew };  // of outputs; the last of fewer than a vector has

template <int kVectors, Reads kReads, class T>
void multiply_all(ConvRows<T> from, const T* weights, int64_t width, ConvResult<T> to, int64_t count) {
  constexpr int kMany = kRows * 5 / 6, kSome = kRows * 2 / 3, kFew = (kRows + 2) / 3;
  // Groups of about one size: 49 rows are 5 of 10.
  const int64_t groups = ceil_div(count, kRows), most = ceil_div(count, groups);
  Ahead<T> ahead{from.next_weights, ceil_div(width, groups)};
  auto multiply_group = [&](auto size) FUSEDRES_INLINE_LAMBDA {
    constexpr int kCount = decltype(size)::value;
    const int64_t some = minimum<int64_t>(kCount, count);
    if constexpr (kReads == Reads::kShared)
      multiply<kCount, kVectors>(from, weights, width, to, some, ahead);
    else
      multiply_bundle<kCount, kReads == Reads::kOwn>(from, weights, width, to, some);
    from.begin += kCount;
    to.y += kCount * to.stride;
    if (to.residual) to.residual += kCount * to.stride;
    if (ahead.weights) ahead.weights += ahead.lines * (kLineBytes / int64_t{sizeof(T)});
    count -= kCount;
  };
  while (count > 0) {
    const int64_t rows = minimum(most, count);
    if (rows > kMany)
      multiply_group(std::integral_constant<int, kRows>{});
    else if (rows > kSome)
      multiply_group(std::integral_constant<int, kMany>{});
    else if (rows > kFew)
      multiply_group(std::integral_constant<int, kSome>{});
    else
      multiply_group(std::integral_constant<int, kFew>{});
  }
}

// As many vectors as one pass computes; `left` outputs of the block are packed from here on.
template <class T>
FUSEDRES_INLINE void multiply_vectors(const ConvRows<T>& from, const T* weights, int64_t left, int64_t width,
                                      const ConvResult<T>& to, int64_t count) {
  if constexpr (std::is_same_v<Value<T>, float>)
    if (from.bundle)
      return to.channels < kLanes ? multiply_all<1, Reads::kOwnOfFew>(from, weights, width, to, count)
                                  : multiply_all<1, Reads::kOwn>(from, weights, width, to, count);
  if (left >= 2 * kLanes) return multiply_all<2, Reads::kShared>(from, weights, width, to, count);
  multiply_all<1, Reads::kShared>(from, weights, width, to, count);
}

}  // namespace

template <class T>
void conv_block(const ConvRows<T>& rows, const T* weights, int64_t width, const ConvResult<T>& to,
                int64_t count) {
  static_assert(2 * kLanes <= ConvWeights::kWidth);
  const int64_t step = rows.bundle ? kLanes : 2 * kLanes;
  ConvRows<T> from = rows;
  ConvResult<T> part = to;
  for (int64_t channel = 0; channel < minimum(width, to.channels); channel += step) {
    part.channels = minimum(step, to.channels - channel);
    multiply_vectors(from, weights + channel * Product<T>::kInputs, width - channel, width, part, count);
    from.next_weights = nullptr;
    if (rows.bundle) from.offset += step;
    part.y += step;
    if (part.bias) part.bias += step;
    if (part.scale) part.scale += step;
    if (part.residual) part.residual += step;
  }
}

template void conv_block(const ConvRows<float>&, const float*, int64_t, const ConvResult<float>&, int64_t);
template void conv_block(const ConvRows<BFloat16>&, const BFloat16*, int64_t, const ConvResult<BFloat16>&,
                         int64_t);

}  // namespace fusedres::FUSEDRES_ISA

#include "conv_block.h"

#include "activation.h"
#include "conv_product.h"

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
#pragma GCC unroll 16
  for (int row = 0; row < kCount; ++row) {
    if (row == rows) return;
    T* const y = to.y + row * to.stride;
    auto z = [&](int v) FUSEDRES_INLINE_LAMBDA {
      const Vec<float> z = conv_epilogue(sums[row][v], to, row, v * kLanes, AllLanes{});
      return to.act == Act::kRelu ? Relu::value(z) : z;
    };
    if constexpr (kVectors == 2)
      store_pair(y, z(0), z(1));
    else
      store(y, z(0));
  }
}

template <class T>
FUSEDRES_INLINE void prefetch_result(const ConvResult<T>& to, int64_t row, int64_t channel) {
  __builtin_prefetch(to.y + row * to.stride + channel, 1);
  if (to.residual) __builtin_prefetch(to.residual + row * to.stride + channel);
}

// One step of every row's sums; `value(row, part)` gives what of x it multiplies.
template <class T, int kCount, int kVectors, class Value>
FUSEDRES_INLINE void step(Vec<float> (&sums)[kCount][kVectors], const T* weights, const Value& value) {
  using P = Product<T>;
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

// y of the `rows` first of kCount rows; meanwhile what the result and the next rows need comes into the
// cache. A step of k loads kVectors vectors and kCount values for kCount * kVectors multiply-adds.
template <int kCount, int kVectors, class T>
void multiply(const ConvRows<T>& from, const T* weights, int64_t width, const ConvResult<T>& to,
              int64_t rows) {
  using P = Product<T>;
  constexpr int64_t kLine = kLineBytes / int64_t{sizeof(T)};
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t channel = 0; channel < kVectors * kLanes; channel += kLine)
      prefetch_result(to, row, channel);
  Vec<float> sums[kCount][kVectors] = {};
  const int64_t whole = from.run / P::kInputs * P::kInputs;
  for (int64_t tap = 0; tap < from.taps; ++tap) {
    const T* x[kCount];
#pragma GCC unroll 16
    for (int row = 0; row < kCount; ++row) x[row] = from.begin[tap * from.pitch + row] + from.offset;
    const T* const* const next = from.begin + tap * from.pitch + kCount;
    for (int64_t k = 0; k < whole;) {
#pragma GCC unroll 16
      for (int row = 0; row < kCount; ++row) __builtin_prefetch(next[row] + from.offset + k);
      for (const int64_t end = minimum(k + kLine, whole); k < end;
           k += P::kInputs, weights += width * P::kInputs)
        step<T>(sums, weights,
                [&](int row, int part) FUSEDRES_INLINE_LAMBDA { return P::values(x[row] + k, part); });
    }
    if constexpr (P::kInputs > 1) {
      if (whole == from.run) continue;
      step<T>(sums, weights,
              [&](int row, int part) FUSEDRES_INLINE_LAMBDA { return P::last(x[row] + whole, part); });
      weights += width * P::kInputs;
    }
  }
  finish(sums, to, rows);
}

// Rows at a time, where fewer are left.
constexpr int kFewRows = kRows == 12 ? 4 : 2;

template <int kVectors, class T>
void multiply_all(ConvRows<T> from, const T* weights, int64_t width, ConvResult<T> to, int64_t count) {
  while (count > 0) {
    const int64_t rows = count > kRows - kFewRows ? kRows : kFewRows;
    if (rows == kRows)
      multiply<kRows, kVectors>(from, weights, width, to, minimum(rows, count));
    else
      multiply<kFewRows, kVectors>(from, weights, width, to, minimum(rows, count));
    from.begin += rows;
    to.y += rows * to.stride;
    if (to.residual) to.residual += rows * to.stride;
    count -= rows;
  }
}

}  // namespace

template <class T>
void conv_block(const ConvRows<T>& rows, const T* weights, int64_t width, const ConvResult<T>& to,
                int64_t count) {
  constexpr int64_t kStep = 2 * kLanes;
  static_assert(kStep <= ConvWeights::kWidth);
  ConvResult<T> part = to;
  for (int64_t channel = 0; channel < minimum(width, to.channels); channel += kStep) {
    part.channels = minimum(kStep, to.channels - channel);
    const T* const w = weights + channel * Product<T>::kInputs;
    if (width - channel >= kStep)
      multiply_all<2>(rows, w, width, part, count);
    else
      multiply_all<1>(rows, w, width, part, count);
    part.y += kStep;
    if (part.bias) part.bias += kStep;
    if (part.scale) part.scale += kStep;
    if (part.residual) part.residual += kStep;
  }
}

template void conv_block(const ConvRows<float>&, const float*, int64_t, const ConvResult<float>&, int64_t);
template void conv_block(const ConvRows<BFloat16>&, const BFloat16*, int64_t, const ConvResult<BFloat16>&,
                         int64_t);

}  // namespace fusedres::FUSEDRES_ISA

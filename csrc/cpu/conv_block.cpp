#include "conv_block.h"

#include "activation.h"

namespace fusedres::FUSEDRES_ISA {
namespace {

constexpr int kLanes = Vec<float>::kLanes;
constexpr int64_t kLine = 16;  // values of a cache line

// Where the registers hold no full result: sums from memory, any activation, any number of channels.
__attribute__((noinline)) void finish_from_memory(const Vec<float>* sums, int64_t vectors,
                                                  const ConvResult& to, int64_t rows) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t channel = 0; channel < to.channels; channel += kLanes) {
      const Vec<float> sum = sums[row * vectors + channel / kLanes];
      float* const y = to.y + row * to.stride + channel;
      auto finish = [&](auto lanes) FUSEDRES_INLINE_LAMBDA {
        store(y, activate(to.act, conv_epilogue(sum, to, row, channel, lanes)), lanes);
      };
      if (channel + kLanes <= to.channels)
        finish(AllLanes{});
      else
        finish(FirstLanes{static_cast<int>(to.channels - channel)});
    }
}

template <int kCount, int kVectors>
FUSEDRES_INLINE void finish(const Vec<float> (&sums)[kCount][kVectors], const ConvResult& to, int64_t rows) {
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
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      const Vec<float> z = conv_epilogue(sums[row][v], to, row, v * kLanes, AllLanes{});
      store(to.y + row * to.stride + v * kLanes, to.act == Act::kRelu ? Relu::value(z) : z);
    }
  }
}

FUSEDRES_INLINE void prefetch_result(const ConvResult& to, int64_t row, int64_t channel) {
  __builtin_prefetch(to.y + row * to.stride + channel, 1);
  if (to.residual) __builtin_prefetch(to.residual + row * to.stride + channel);
}

// y of the `rows` first of kCount rows; meanwhile what the result and the next rows need comes into the
// cache. A step of k loads kVectors vectors and kCount values for kCount * kVectors multiply-adds.
template <int kCount, int kVectors>
void multiply(const ConvRows& from, const float* weights, int64_t width, const ConvResult& to, int64_t rows) {
  for (int64_t row = 0; row < rows; ++row)
    for (int v = 0; v < kVectors; ++v) prefetch_result(to, row, v * kLanes);
  Vec<float> sums[kCount][kVectors] = {};
  for (int64_t tap = 0; tap < from.taps; ++tap) {
    const float* x[kCount];
#pragma GCC unroll 16
    for (int row = 0; row < kCount; ++row) x[row] = from.begin[tap * from.pitch + row] + from.offset;
    const float* const* const next = from.begin + tap * from.pitch + kCount;
    for (int64_t k = 0; k < from.run;) {
#pragma GCC unroll 16
      for (int row = 0; row < kCount; ++row) __builtin_prefetch(next[row] + from.offset + k);
      for (const int64_t end = minimum(k + kLine, from.run); k < end; ++k, weights += width) {
        Vec<float> w[kVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) w[v] = load(weights + v * kLanes, AllLanes{});
#pragma GCC unroll 16
        for (int row = 0; row < kCount; ++row) {
          const Vec<float> value = broadcast(x[row][k]);
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) sums[row][v] = multiply_add(value, w[v], sums[row][v]);
        }
      }
    }
  }
  finish(sums, to, rows);
}

// Rows at a time, where fewer are left.
constexpr int kFewRows = kRows == 12 ? 4 : 2;

template <int kVectors>
void multiply_all(ConvRows from, const float* weights, int64_t width, ConvResult to, int64_t count) {
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

void conv_block(const ConvRows& rows, const float* weights, int64_t width, const ConvResult& to,
                int64_t count) {
  constexpr int64_t kStep = 2 * kLanes;
  static_assert(kStep <= ConvWeights::kWidth);
  ConvResult part = to;
  for (int64_t channel = 0; channel < minimum(width, to.channels); channel += kStep) {
    part.channels = minimum(kStep, to.channels - channel);
    if (width - channel >= kStep)
      multiply_all<2>(rows, weights + channel, width, part, count);
    else
      multiply_all<1>(rows, weights + channel, width, part, count);
    part.y += kStep;
    if (part.bias) part.bias += kStep;
    if (part.residual) part.residual += kStep;
  }
}

}  // namespace fusedres::FUSEDRES_ISA

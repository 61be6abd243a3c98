#include "batch_norm.h"

#include "../welford.h"
#include "constants.h"

namespace fusedres::FUSEDRES_ISA {
namespace {

constexpr int64_t kTile = 64;  // channels that are finished together

// stats of one channel, from its mean and biased variance.
template <class A>
void write_stats(const NormOperand& norm, int64_t channels, int64_t c, double mean, double var) {
  A* const stats = static_cast<A*>(norm.stats);
  const A high = static_cast<A>(mean);
  stats[c] = high;
  // An infinite mean has no remainder.
  stats[channels + c] = __builtin_isfinite(high) ? static_cast<A>(mean - double{high}) : A{0};
  stats[2 * channels + c] = static_cast<A>(1 / __builtin_sqrt(var + norm.eps));
}

template <class A>
void move_running(void* running, int64_t c, double momentum, double now) {
  if (!running) return;
  A& value = static_cast<A*>(running)[c];
  value = static_cast<A>(double{value} * (1 - momentum) + now * momentum);
}

// stats of channels [first, first + count) from their parts, merged in the order of memory; running ones
// move. Each period of a wide part is a part of its own.
template <class A>
void finish_statistics(const NormOperand& norm, const WideShape& wide, const PartStatistics& pass,
                       int64_t first, int64_t count) {
  const int64_t channels = wide.shape.channels / wide.repeats;
  const int64_t pixels = wide.shape.order == Order::kPixels ? 1 : wide.shape.pixels;
  double mean[kTile] = {}, m2[kTile] = {}, values = 0;
  for (int64_t part = 0; part < pass.parts.count * wide.repeats; ++part) {
    const Parts::Range range = pass.parts.range(part / wide.repeats);
    const double part_values = static_cast<double>((range.end - range.begin) * pixels);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = part * channels + first + i;
      const Moments<double> before{values, mean[i], m2[i]},
          part_moments{part_values, pass.mean[at], pass.m2[at]};
      const Moments<double> merged = merge(before, part_moments);
      mean[i] = merged.mean;
      m2[i] = merged.m2;
    }
    values += part_values;
  }
  for (int64_t i = 0; i < count; ++i) {
    write_stats<A>(norm, channels, first + i, mean[i], m2[i] / values);
    move_running<A>(norm.running_mean, first + i, norm.momentum, mean[i]);
    move_running<A>(norm.running_var, first + i, norm.momentum, m2[i] / (values - 1));
  }
}

}  // namespace

template <class A>
void find_statistics(const NormOperand& norm, const Shape& shape, DType dtype, Arena& arena) {
  const int64_t channels = shape.channels;
  if (norm.source == Statistics::kRunning)
    for (int64_t c = 0; c < channels; ++c)
      write_stats<A>(norm, channels, c, static_cast<const A*>(norm.running_mean)[c],
                     static_cast<const A*>(norm.running_var)[c]);
  if (norm.source != Statistics::kBatch) return;
  const WideShape wide = widen_rows(shape, Gate{}, false);
  const Parts parts = cut(wide.shape, false);
  const int64_t size = parts.count * wide.shape.channels;
  const PartStatistics pass{wide.shape,
                            dtype,
                            norm.data,
                            parts,
                            arena.take<A>(size),
                            arena.take<double>(size),
                            arena.take<double>(size)};
  part_statistics(pass);
  const int64_t merges = parts.count * wide.repeats * kTile;
  parallel(ceil_div(channels, kTile), 4 * merges, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * kTile; first < minimum(end * kTile, channels); first += kTile)
      finish_statistics<A>(norm, wide, pass, first, minimum(kTile, channels - first));
  });
}

#if !defined(__AVX2__)
template void find_statistics<double>(const NormOperand&, const Shape&, DType, Arena&);
#endif
template void find_statistics<float>(const NormOperand&, const Shape&, DType, Arena&);

}  // namespace fusedres::FUSEDRES_ISA

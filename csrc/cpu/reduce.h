// Sums over a channel: float runs of at most 64 values, added up in double in the order of memory.
#pragma once

#include "walk.h"

namespace fusedres::FUSEDRES_ISA {

// Pixels whose terms are added in registers before they go to a run's totals.
constexpr int64_t kRowGroup = 4;

// The rows of a group are too many streams for the hardware to run ahead of: measured, 1.2 to 1.5 times
// faster with this.
template <Order kOrder, class T>
FUSEDRES_INLINE void prefetch_next_rows(const T* p, const Shape& shape, const Place& at) {
  if constexpr (kOrder == Order::kPixels) __builtin_prefetch(p + at.element + kRowGroup * shape.channels);
}

// totals[k][c] += the sum of body's k-th term over rows [begin, end) and channels [first, last).
// body(place, lanes, sums) adds a vector's terms to sums[0..kSums).
template <class A, bool kShort, int kSums, class Body>
FUSEDRES_INLINE void reduce_pixels(const Shape shape, Parts::Range rows, int64_t first, int64_t last,
                                   int64_t gated, double* const (&totals)[kSums], const Body body) {
  constexpr int64_t kLanes = Vec<A>::kLanes;
  const int64_t mask_row = shape.mask_row_bytes();
  A runs[kSums][kChannelTile + kLanes];
  for (int64_t run = rows.begin; run < rows.end; run += kRun) {
    const int64_t run_end = minimum(run + kRun, rows.end);
    for (int64_t group = run; group < run_end; group += kRowGroup) {
      const int64_t group_rows = minimum(kRowGroup, run_end - group);
      along_channels<A>(shape, group, first, last, gated, [&](Place at, auto lanes) FUSEDRES_INLINE_LAMBDA {
        A* run_sums[kSums];
        Vec<A> sums[kSums];
        for (int k = 0; k < kSums; ++k) {
          run_sums[k] = runs[k] + (at.channel - first);
          sums[k] = group == run ? Vec<A>{} : load(run_sums[k], AllLanes{});
        }
        int64_t rows_left = group_rows;
        auto add_row = [&]() FUSEDRES_INLINE_LAMBDA {
          body(at, lanes, sums);
          at.element += shape.channels;
          at.mask += mask_row;
        };
        if (kShort && kVectorInstructions && rows_left == kRowGroup) {
          for (; rows_left > 0; rows_left -= 4) {
            add_row(), add_row(), add_row(), add_row();
          }
        }
        for (; rows_left > 0; --rows_left) add_row();
        for (int k = 0; k < kSums; ++k) store(run_sums[k], sums[k]);
      });
    }
    for (int k = 0; k < kSums; ++k)
      for (int64_t c = first; c < last; ++c) totals[k][c] += runs[k][c - first];
  }
}

// The same over images [begin, end) of planes.
template <class A, bool kShort, int kSums, class Body>
FUSEDRES_INLINE void reduce_planes(const Shape shape, Parts::Range images, int64_t first, int64_t last,
                                   int64_t image_stride, double* const (&totals)[kSums], const Body body) {
  constexpr int64_t kLanes = Vec<A>::kLanes;
  constexpr int kChains = kShort && kVectorInstructions ? 4 : 1;  // additions in flight
  for (int64_t image = images.begin; image < images.end; ++image) {
    for (int64_t c = first; c < last; ++c) {
      const int64_t plane = image * shape.channels + c;
      Place at{plane * shape.pixels, plane * shape.mask_row_bytes(), c, image * image_stride};
      for (int64_t left = shape.pixels; left > 0;) {
        Vec<A> sums[4][kSums] = {};
        auto add_step = [&](int chain) FUSEDRES_INLINE_LAMBDA {
          body(at, AllLanes{}, sums[chain]);
          at.element += kLanes;
          at.mask += kLanes / 8;
          left -= kLanes;
        };
        const int64_t run_end = maximum<int64_t>(kChains * kLanes, left - (kRun - kChains) * kLanes);
        while (left >= run_end) {
          add_step(0);
          if constexpr (kChains == 4) add_step(1), add_step(2), add_step(3);
        }
        if (left < kChains * kLanes) {
          while (left >= kLanes) add_step(0);
          if (left > 0) body(at, FirstLanes{static_cast<int>(left)}, sums[0]);
          left = 0;
        }
        for (int k = 0; k < kSums; ++k)
          totals[k][c] += sum_lanes((sums[0][k] + sums[1][k]) + (sums[2][k] + sums[3][k]));
      }
    }
  }
}

// Channels of one unit of work: of planes few enough that large ones occupy all threads. No sum depends on
// it.
template <Order kOrder>
FUSEDRES_INLINE int64_t unit_channels(const Shape& shape, const Parts& parts) {
  if constexpr (kOrder == Order::kPixels) return kChannelTile;
  return minimum<int64_t>(16, ceil_div(kGrainElements, parts.length * shape.pixels));
}

// body(part, first channel, last channel) for every piece of a sum, by all threads.
template <Order kOrder, class Body>
void for_each_part(const Shape& shape, const Parts& parts, const Body& body) {
  const int64_t channels = unit_channels<kOrder>(shape, parts);
  const int64_t tiles = ceil_div(shape.channels, channels);
  const int64_t each = maximum<int64_t>(1, shape.elements() / (parts.count * tiles));
  parallel(parts.count * tiles, each, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first = unit % tiles * channels;
      body(unit / tiles, first, minimum(first + channels, shape.channels));
    }
  });
}

}  // namespace fusedres::FUSEDRES_ISA

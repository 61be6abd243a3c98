// Sums over a channel: float runs of at most 64 values, added up in double in the order of memory.
#pragma once

#include "walk.h"

namespace fusedres::FUSEDRES_ISA {

// Asks for what a reduction of pixels reads soon, in the order of memory, which the hardware then follows,
// and into the second-level cache: the first level takes too few requests at once to keep memory busy.
template <Order kOrder, class T>
FUSEDRES_INLINE void prefetch_ahead(const T* p, const Place& at) {
  if constexpr (kOrder == Order::kPixels) __builtin_prefetch(p + at.ahead, 0, 2);
}

// totals[k] += the sum of body's k-th term over rows [begin, end) and kVectors vectors of channels from `at`
// on.
template <class A, int kVectors, int kSums, class Lanes, class Body>
FUSEDRES_INLINE void reduce_block(const Shape& shape, Parts::Range rows, Place at, Lanes lanes,
                                  double* const (&totals)[kSums], const Body& body) {
  constexpr int64_t kLanes = Vec<A>::kLanes;
  const int64_t mask_row = shape.mask_row_bytes();
  Vec<A> sums[kVectors][kSums] = {};
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    Place vector = at;
    for (int v = 0; v < kVectors; ++v) {
      body(vector, lanes, sums[v]);
      vector.element += kLanes;
      vector.mask += kLanes / 8;
      vector.channel += kLanes;
      vector.ahead += kLanes;
    }
    at.element += shape.channels;
    at.mask += mask_row;
    at.ahead += kVectors * kLanes;
  }
  for (int k = 0; k < kSums; ++k)
    for (int v = 0; v < kVectors; ++v) add_lanes(totals[k] + at.channel + v * kLanes, sums[v][k], lanes);
}

// totals[k][c] += the sum of body's k-th term over rows [begin, end) and channels [first, last).
// body(place, lanes, sums) adds a vector's terms to sums[0..kSums).
template <class A, bool kShort, int kSums, class Body>
FUSEDRES_INLINE void reduce_pixels(const Shape shape, Parts::Range rows, int64_t first, int64_t last,
                                   int64_t gated, double* const (&totals)[kSums], const Body body) {
  constexpr int64_t kLanes = Vec<A>::kLanes;
  constexpr int kVectors = kShort && kVectorInstructions ? 4 : 1;
  constexpr int64_t kBlock = kVectors * kLanes;
  for (int64_t begin = rows.begin; begin < rows.end; begin += kRun) {
    const Parts::Range run{begin, minimum(begin + kRun, rows.end)};
    auto place = [&](int64_t c) {
      return Place{begin * shape.channels + c, begin * shape.mask_row_bytes() + c / 8, c, gated,
                   (begin + kRun) * shape.channels + kRun * c};
    };
    int64_t c = first;
    for (; c + kBlock <= last; c += kBlock)
      reduce_block<A, kVectors, kSums>(shape, run, place(c), AllLanes{}, totals, body);
    for (; c + kLanes <= last; c += kLanes)
      reduce_block<A, 1, kSums>(shape, run, place(c), AllLanes{}, totals, body);
    if (c < last)
      reduce_block<A, 1, kSums>(shape, run, place(c), FirstLanes{static_cast<int>(last - c)}, totals, body);
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
      Place at{plane * shape.pixels, plane * shape.mask_row_bytes(), c, image * image_stride, 0};
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
  if constexpr (kOrder == Order::kPixels) return shape.channels;
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

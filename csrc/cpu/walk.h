// How a pass goes over a tensor: which elements share a channel, in which order, cut into which pieces.
#pragma once

#include "../params.h"
#include "memory.h"
#include "parallel.h"

namespace fusedres::FUSEDRES_ISA {

template <class T>
FUSEDRES_INLINE T minimum(T a, T b) {
  return b < a ? b : a;
}
template <class T>
FUSEDRES_INLINE T maximum(T a, T b) {
  return a < b ? b : a;
}
FUSEDRES_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether short loop bodies are worth repeating: without vector instructions they are long already.
#if defined(__AVX2__)
constexpr bool kVectorInstructions = true;
#else
constexpr bool kVectorInstructions = false;
#endif

// Below this many elements waking another thread costs more than it saves.
constexpr int64_t kGrainElements = 1 << 15;

template <class Body>
void parallel(int64_t count, int64_t elements_each, const Body& body) {
  const int64_t grain = maximum<int64_t>(1, kGrainElements / maximum<int64_t>(1, elements_each));
  if (count <= grain) return body(0, count);
  auto call = [](void* context, int64_t begin, int64_t end) {
    (*static_cast<const Body*>(context))(begin, end);
  };
  parallel_for(count, grain, call, const_cast<Body*>(&body));
}

// One vector's place. Its lanes are neighbours in memory: channels of a pixel, or pixels of a plane.
struct Place {
  int64_t element;  // of its first lane
  int64_t mask;     // byte of its first lane in the bit mask
  int64_t channel;  // of its first lane; in planes, of all
  int64_t gated;    // where its image's rows of gated constants begin
  int64_t ahead;    // element that a reduction of pixels asks the memory for now
};

// The constants of a place's channels.
template <Order kOrder, class A, class Lanes>
FUSEDRES_INLINE Vec<A> per_channel(const A* table, const Place& at, Lanes lanes) {
  if constexpr (kOrder == Order::kPixels) return load(table + at.channel, lanes);
  return broadcast(table[at.channel]);
}

// body(place, lanes) for every vector of channels [first, last) of one pixel.
template <class A, class Body>
FUSEDRES_INLINE void along_channels(const Shape& shape, int64_t row, int64_t first, int64_t last,
                                    int64_t gated, const Body& body) {
  constexpr int64_t kLanes = Vec<A>::kLanes;
  Place at{row * shape.channels + first, row * shape.mask_row_bytes() + first / 8, first, gated, 0};
  for (; at.channel + kLanes <= last; at.element += kLanes, at.mask += kLanes / 8, at.channel += kLanes)
    body(at, AllLanes{});
  if (at.channel < last) body(at, FirstLanes{static_cast<int>(last - at.channel)});
}

// body(place, lanes) for every vector of pixels [begin, end) of one plane; `begin` is a multiple of 8.
template <class A, class Body>
FUSEDRES_INLINE void along_plane(const Shape& shape, int64_t plane, int64_t begin, int64_t end, int64_t gated,
                                 const Body& body) {
  constexpr int64_t kLanes = Vec<A>::kLanes;
  Place at{plane * shape.pixels + begin, plane * shape.mask_row_bytes() + begin / 8, plane % shape.channels,
           gated, 0};
  int64_t left = end - begin;
  for (; left >= kLanes; left -= kLanes, at.element += kLanes, at.mask += kLanes / 8) body(at, AllLanes{});
  if (left > 0) body(at, FirstLanes{static_cast<int>(left)});
}

// Channels that are gone through together: their constants stay in the first-level cache.
constexpr int64_t kChannelTile = 512;
constexpr int64_t kRowTile = 64;

// along_channels as a call: inlined, the loops around it would take the registers that its pointers need.
template <class A, class Body>
__attribute__((noinline)) void along_row(const Shape& shape, int64_t row, int64_t first, int64_t last,
                                         int64_t gated, const Body& body) {
  const Body local = body;
  along_channels<A>(shape, row, first, last, gated, local);
}

// body(place, lanes) for all of x, by all threads. From the end backwards, tile by tile: a pass before this
// one went forwards, so that the caches hold the end. `image_stride` is between two images' gated constants.
//
// What is captured is copied per row or plane range: the compiler keeps a local copy in registers, where
// through a reference every store would make it load the members again.
template <class A, Order kOrder, class Body>
void for_each_vector(const Shape& all, int64_t image_stride, const Body& body_for_all) {
  if constexpr (kOrder == Order::kPlanes) {
    // Planes may be fewer than threads, and too small to be a tile each.
    const int64_t pieces = ceil_div(all.pixels, kGrainElements);
    const int64_t together = ceil_div(kGrainElements, all.pixels);
    parallel(all.images * all.channels * pieces, minimum(all.pixels, kGrainElements),
             [&](int64_t begin, int64_t end) {
               const Shape shape = all;
               const Body body = body_for_all;
               while (end > begin) {
                 const int64_t tile = maximum(begin, end - together);
                 for (int64_t piece = tile; piece < end; ++piece) {
                   const int64_t plane = piece / pieces, first = piece % pieces * kGrainElements;
                   along_plane<A>(shape, plane, first, minimum(first + kGrainElements, shape.pixels),
                                  plane / shape.channels * image_stride, body);
                 }
                 end = tile;
               }
               end_stream();
             });
  } else {
    parallel(all.rows(), all.channels, [&](int64_t begin, int64_t end) {
      const Shape shape = all;
      while (end > begin) {
        const int64_t image = (end - 1) / shape.pixels;
        const int64_t image_begin = image_stride ? image * shape.pixels : 0;
        const int64_t tile = maximum(maximum(begin, end - kRowTile), image_begin);
        for (int64_t c = 0; c < shape.channels; c += kChannelTile)
          for (int64_t row = tile; row < end; ++row)
            along_row<A>(shape, row, c, minimum(c + kChannelTile, shape.channels), image * image_stride,
                         body_for_all);
        end = tile;
      }
      end_stream();
    });
  }
}

// The pieces into which sums over a channel are cut: by the shape alone, so that no sum depends on the
// threads. A piece is a range of rows (pixels) or of images (planes); with a gate it stays inside one image.
struct Parts {
  int64_t count;
  int64_t extent;  // rows or images that belong together
  int64_t length;  // of a piece
  int64_t pieces;  // of an extent

  struct Range {
    int64_t begin;
    int64_t end;
  };
  Range range(int64_t part) const {
    const int64_t base = part / pieces * extent, begin = part % pieces * length;
    return {base + begin, base + minimum(begin + length, extent)};
  }
  int64_t image(int64_t part) const { return part / pieces; }  // with a gate
};

constexpr int64_t kRun = 32;  // values that may be added up in float

FUSEDRES_INLINE Parts cut(const Shape& shape, bool per_image) {
  const bool pixels = shape.order == Order::kPixels;
  const int64_t all = pixels ? shape.rows() : shape.images;
  const int64_t extent = !per_image ? all : pixels ? shape.pixels : 1;
  // Many enough for many threads, few enough that writing and merging them is small beside reading x.
  const int64_t wanted = pixels ? minimum<int64_t>(64, maximum<int64_t>(8, (1 << 15) / shape.channels)) : 16;
  const int64_t step = pixels ? kRun : 1;
  const int64_t length = minimum(extent, ceil_div(ceil_div(all, wanted), step) * step);
  const int64_t pieces = ceil_div(extent, length);
  return {all / extent * pieces, extent, length, pieces};
}

}  // namespace fusedres::FUSEDRES_ISA

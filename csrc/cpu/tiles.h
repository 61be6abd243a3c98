// The tile unit (AMX): eight registers of 16 rows of 64 bytes, and the product of two of them.
//
// A tile of x is 16 rows of 32 bfloat16; of weights 16 pairs of inputs, each of 16 outputs; of sums 16 rows
// of 16 float32. In assembly, so that any compiler takes it; with FUSEDRES_EMULATED_TILES in plain C++, for
// tests on machines that have no such unit.
#pragma once

#include "simd.h"

namespace fusedres::FUSEDRES_ISA {

constexpr int64_t kTileRows = 16, kTileInputs = 32;

#if defined(FUSEDRES_EMULATED_TILES)

struct Tile {
  unsigned char bytes[kTileRows][64];
};
inline thread_local Tile tiles[8];
inline thread_local bool tiles_configured = false;

template <int kTile>
void tile_zero() {
  if (!tiles_configured) __builtin_trap();  // as the unit does
  __builtin_memset(&tiles[kTile], 0, sizeof(Tile));
}
template <int kTile>
void tile_load(const void* from, int64_t stride_bytes) {
  for (int64_t row = 0; row < kTileRows; ++row)
    __builtin_memcpy(tiles[kTile].bytes[row], static_cast<const char*>(from) + row * stride_bytes, 64);
}
template <int kTile>
void tile_store(void* to, int64_t stride_bytes) {
  for (int64_t row = 0; row < kTileRows; ++row)
    __builtin_memcpy(static_cast<char*>(to) + row * stride_bytes, tiles[kTile].bytes[row], 64);
}
// sums += rows * weights
template <int kSums, int kRowsOfX, int kWeights>
void tile_product() {
  auto half = [](const Tile& tile, int64_t row, int64_t i) {
    uint16_t bits;
    __builtin_memcpy(&bits, &tile.bytes[row][2 * i], sizeof bits);
    const uint32_t word = uint32_t{bits} << 16;
    float value;
    __builtin_memcpy(&value, &word, sizeof value);
    return value;
  };
  for (int64_t row = 0; row < kTileRows; ++row)
    for (int64_t output = 0; output < 16; ++output) {
      float sum;
      __builtin_memcpy(&sum, &tiles[kSums].bytes[row][4 * output], sizeof sum);
      for (int64_t k = 0; k < kTileInputs; ++k)
        sum += half(tiles[kRowsOfX], row, k) * half(tiles[kWeights], k / 2, 2 * output + k % 2);
      __builtin_memcpy(&tiles[kSums].bytes[row][4 * output], &sum, sizeof sum);
    }
}
// What the registers held is lost.
inline void tile_configure() {
  __builtin_memset(tiles, 0xff, sizeof tiles);
  tiles_configured = true;
}
inline void tile_release() {
  __builtin_memset(tiles, 0xff, sizeof tiles);
  tiles_configured = false;
}

#else

template <int kTile>
FUSEDRES_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kTile>
FUSEDRES_INLINE void tile_load(const void* from, int64_t stride_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride_bytes), "i"(kTile) : "memory");
}
template <int kTile>
FUSEDRES_INLINE void tile_store(void* to, int64_t stride_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride_bytes), "i"(kTile) : "memory");
}
// sums += rows * weights
template <int kSums, int kRowsOfX, int kWeights>
FUSEDRES_INLINE void tile_product() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kRowsOfX), "i"(kWeights));
}

struct alignas(64) TileConfiguration {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {kTileRows, kTileRows, kTileRows, kTileRows, kTileRows, kTileRows, kTileRows, kTileRows};
};
static_assert(sizeof(TileConfiguration) == 64);

FUSEDRES_INLINE void tile_configure() {
  const TileConfiguration configuration;
  asm volatile("ldtilecfg %0" ::"m"(configuration));
}
FUSEDRES_INLINE void tile_release() { asm volatile("tilerelease"); }

#endif

// The sums of up to 2 x 2 tiles in registers 0 to 3; rows pass through 4 and 5, weights through 6 and 7.
template <int kRowTiles, int kColumnTiles>
struct TileSums {
  static FUSEDRES_INLINE void zero() {
    tile_zero<0>();
    if (kColumnTiles > 1) tile_zero<1>();
    if (kRowTiles > 1) tile_zero<2>();
    if (kRowTiles > 1 && kColumnTiles > 1) tile_zero<3>();
  }

  // `lower` is where the second 16 rows begin; a second tile of weights stands beside the first one.
  static FUSEDRES_INLINE void add(const BFloat16* rows, int64_t stride, const BFloat16* lower,
                                  int64_t lower_stride, const BFloat16* weights, int64_t weight_stride) {
    tile_load<4>(rows, stride);
    tile_load<6>(weights, weight_stride);
    tile_product<0, 4, 6>();
    if (kColumnTiles > 1) {
      tile_load<7>(weights + kTileInputs, weight_stride);
      tile_product<1, 4, 7>();
    }
    if (kRowTiles > 1) {
      tile_load<5>(lower, lower_stride);
      tile_product<2, 5, 6>();
      if (kColumnTiles > 1) tile_product<3, 5, 7>();
    }
  }

  // To rows of 32, the next one `stride` bytes on.
  static FUSEDRES_INLINE void store(float* to, int64_t stride) {
    float* const lower = to + kTileRows * stride / int64_t{sizeof(float)};
    tile_store<0>(to, stride);
    if (kColumnTiles > 1) tile_store<1>(to + 16, stride);
    if (kRowTiles > 1) tile_store<2>(lower, stride);
    if (kRowTiles > 1 && kColumnTiles > 1) tile_store<3>(lower + 16, stride);
  }
};

}  // namespace fusedres::FUSEDRES_ISA

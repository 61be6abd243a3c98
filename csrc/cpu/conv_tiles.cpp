// conv_block by the tile unit: 32 rows times 32 outputs in four tiles of sums.
//
// Two tiles of x and two of weights are loaded for four products. Meanwhile the vector unit finishes the rows
// of the block before, whose sums wait in memory.
#include "activation.h"
#include "conv_block.h"
#include "tiles.h"

namespace fusedres::FUSEDRES_ISA {
namespace {

constexpr int kLanes = Vec<float>::kLanes;
constexpr int64_t kWidth = ConvWeights::kWidth;
constexpr int64_t kSumBytes = kWidth * int64_t{sizeof(float)};  // from one row's sums to the next one's

struct alignas(64) Sums {
  float rows[kRows][kWidth];
};

// The rows of a block that are still to be finished.
class Pending {
 public:
  Pending() = default;
  Pending(const Sums& sums, const ConvResult<BFloat16>& to, int64_t count)
      : sums_(&sums), to_(to), count_(count) {}

  int64_t left() const { return count_ - row_; }

  FUSEDRES_INLINE void finish(int64_t rows) {
    for (const int64_t end = minimum(row_ + rows, count_); row_ < end; ++row_)
      for (int64_t channel = 0; channel < to_.channels; channel += kLanes) {
        if (channel + kLanes <= to_.channels)
          finish(channel, AllLanes{});
        else
          finish(channel, FirstLanes{static_cast<int>(to_.channels - channel)});
      }
  }

 private:
  template <class Lanes>
  FUSEDRES_INLINE void finish(int64_t channel, Lanes lanes) const {
    const Vec<float> sum = load(&sums_->rows[row_][channel], AllLanes{});
    const Vec<float> z = conv_epilogue(sum, to_, row_, channel, lanes);
    BFloat16* const y = to_.y + row_ * to_.stride + channel;
    if (to_.act == Act::kRelu) return store(y, Relu::value(z), lanes);
    store(y, to_.act == Act::kIdentity ? z : activate(to_.act, z), lanes);
  }

  const Sums* sums_ = nullptr;
  ConvResult<BFloat16> to_{};
  int64_t count_ = 0;
  int64_t row_ = 0;
};

// From one of 16 rows at equal distances to the next one.
FUSEDRES_INLINE int64_t stride_bytes(const BFloat16* const* begin) {
  return reinterpret_cast<intptr_t>(begin[1]) - reinterpret_cast<intptr_t>(begin[0]);
}

// The sums of kRowTiles * 16 rows.
template <int kRowTiles, int kColumnTiles>
void multiply(const ConvRows<BFloat16>& from, const BFloat16* weights, Sums& sums, Pending& before) {
  using Tiles = TileSums<kRowTiles, kColumnTiles>;
  constexpr int64_t kWeightBytes = kColumnTiles * 64;  // from one pair of inputs to the next one
  Tiles::zero();
  const int64_t each = ceil_div(before.left(), from.taps * from.run / kTileInputs);
  for (int64_t tap = 0; tap < from.taps; ++tap) {
    const BFloat16* const* const rows = from.begin + tap * from.pitch;
    const BFloat16* const* const lower = rows + (kRowTiles - 1) * kTileRows;
    const BFloat16 *const x = rows[0] + from.offset, *const lower_x = lower[0] + from.offset;
    const int64_t stride = stride_bytes(rows), lower_stride = stride_bytes(lower);
    for (int64_t k = 0; k < from.run; k += kTileInputs, weights += kWeightBytes * kTileRows / 2) {
      Tiles::add(x + k, stride, lower_x + k, lower_stride, weights, kWeightBytes);
      before.finish(each);
    }
  }
  before.finish(before.left());
  Tiles::store(&sums.rows[0][0], kSumBytes);
}

template <int kColumnTiles>
void multiply_all(ConvRows<BFloat16> from, const BFloat16* weights, ConvResult<BFloat16> to, int64_t count) {
  Sums sums[2];
  Pending before;
  for (int turn = 0; count > 0; turn ^= 1, count -= kRows) {
    if (count > kTileRows)
      multiply<2, kColumnTiles>(from, weights, sums[turn], before);
    else
      multiply<1, kColumnTiles>(from, weights, sums[turn], before);
    before = Pending(sums[turn], to, minimum<int64_t>(kRows, count));
    from.begin += kRows;
    to.y += kRows * to.stride;
    if (to.residual) to.residual += kRows * to.stride;
  }
  before.finish(before.left());
}

}  // namespace

template <class T>
void conv_block(const ConvRows<T>& rows, const T* weights, int64_t width, const ConvResult<T>& to,
                int64_t count) {
  tile_configure();
  if (width == kWidth)
    multiply_all<2>(rows, weights, to, count);
  else
    multiply_all<1>(rows, weights, to, count);
  tile_release();
}

template void conv_block(const ConvRows<BFloat16>&, const BFloat16*, int64_t, const ConvResult<BFloat16>&,
                         int64_t);

}  // namespace fusedres::FUSEDRES_ISA

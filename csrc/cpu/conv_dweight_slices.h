// The operands of conv_dweight on the tile unit, in slices of 32 channels:
//
//   (steps, pairs of a step, panels, kPanel, pixels of a pair)
//
// A step is 32 neighbouring pixels of dy, across rows and images, or what their windows see of x at a point:
// a tap of the window, or where there are few inputs one of its rows. So a panel of a step is a tile of
// weights; turned, as dy's are, it is one of rows: 16 outputs at 32 pixels.
#pragma once

#include "conv_weights.h"
#include "tiles.h"
#include "walk.h"

namespace fusedres::FUSEDRES_ISA {

constexpr int64_t kPanel = ConvWeights::kPanel;
constexpr int64_t kSlice = ConvWeights::kWidth;  // channels
constexpr int64_t kStepPixels = kTileInputs;     // the products of one tile
constexpr int64_t kStepPairs = kStepPixels / 2;  // a tile's rows of weights
constexpr int64_t kPairValues = 2 * kSlice;      // of a pair of pixels in a slice
constexpr int64_t kStepValues = kStepPairs * kPairValues;
constexpr int64_t kPairBytes = kPairValues * int64_t{sizeof(BFloat16)};

// What the windows of x are taken apart into.
struct Points {
  bool flat;
  int64_t count;
  int64_t across;  // columns of a point
  int64_t values;  // of a point

  explicit Points(const ConvDweight& op)
      : flat(op.inputs < kPanel),
        count(op.rows.kernel * (flat ? 1 : op.columns.kernel)),
        across(flat ? op.columns.kernel : 1),
        values(across * op.inputs) {}
};

// Where some pixels' channels lie: of dy, and of x at every point. Beyond its borders there are zeros, and
// pixels that don't exist fill up the last step with them.
class Pixels {
 public:
  static int64_t bytes(const ConvDweight& op) {  // a pixel's
    const Points points(op);
    return (points.count + 1) * int64_t{sizeof(void*)} +
           (points.flat ? points.count * points.values * int64_t{sizeof(BFloat16)} : 0);
  }

  Pixels(const ConvDweight& op, int64_t most, Arena& arena)
      : op_(op),
        points_(op),
        pitch_(most),
        begin_(arena.take<const BFloat16*>((points_.count + 1) * pitch_)),
        copies_(points_.flat ? arena.take<BFloat16>(points_.count * pitch_ * points_.values) : nullptr) {
    const int64_t size = maximum(points_.values, op.outputs);
    auto* const zeros = arena.take<BFloat16>(size);
    for (int64_t i = 0; i < size; ++i) zeros[i] = {};
    zeros_ = zeros;
  }

  const BFloat16* const* of_x(int64_t point) const { return begin_ + point * pitch_; }
  const BFloat16* const* of_dy() const { return of_x(points_.count); }

  void place(int64_t first, int64_t count) {
    const BFloat16** const of_dy = begin_ + points_.count * pitch_;
    for (int64_t i = 0; i < count; ++i)
      of_dy[i] = static_cast<const BFloat16*>(op_.dy) + (first + i) * op_.outputs;
    int64_t row = first / op_.columns.outputs, column = first % op_.columns.outputs;
    for (int64_t i = 0; i < count; ++row, column = 0) {
      const int64_t some = minimum(op_.columns.outputs - column, count - i);
      place_row(row, column, some, begin_ + i);
      i += some;
    }
    for (int64_t point = 0; point <= points_.count; ++point)
      for (int64_t i = count; i < ceil_div(count, kStepPixels) * kStepPixels; ++i)
        begin_[point * pitch_ + i] = zeros_;
  }

 private:
  // What `count` windows in one row of an image see; `row` counts across images.
  void place_row(int64_t row, int64_t column, int64_t count, const BFloat16** to) {
    const ConvAxis &rows = op_.rows, &columns = op_.columns;
    const int64_t image = row / rows.outputs, row_size = columns.size * op_.inputs;
    for (int64_t i = 0; i < rows.kernel; ++i) {
      const int64_t of_x = rows.place(row % rows.outputs, i);
      const BFloat16* const x_row =
          static_cast<const BFloat16*>(op_.x) + (image * rows.size + of_x) * row_size;
      for (int64_t j = 0; j < columns.kernel; j += points_.across, to += pitch_) {
        // Of windows [first, last) every value is inside.
        const int64_t first =
            rows.inside(of_x) ? minimum(column + count, maximum(column, first_inside(j))) : column + count;
        const int64_t last = maximum(first, minimum(column + count, end_inside(j)));
        const BFloat16* const begin = x_row + columns.place(first, j) * op_.inputs;
        for (int64_t k = first; k < last; ++k)
          to[k - column] = begin + (k - first) * columns.stride * op_.inputs;
        auto place_each = [&](int64_t k, int64_t end) {
          for (; k < end; ++k) {
            const BFloat16** const at = to + (k - column);
            *at = points_.flat && rows.inside(of_x) ? copy(x_row, columns.place(k, j), at - begin_) : zeros_;
          }
        };
        place_each(column, first);
        place_each(last, column + count);
      }
    }
  }

  // The windows whose column j, or all whose columns from j on of one point, lie in x as the kernel has them.
  int64_t first_inside(int64_t j) const {
    const int64_t before = -op_.columns.place(0, j);
    return before > 0 ? ceil_div(before, op_.columns.stride) : 0;
  }
  int64_t end_inside(int64_t j) const {
    const ConvAxis& columns = op_.columns;
    if (points_.across > 1 && columns.dilation > 1) return 0;
    const int64_t left = columns.size - columns.place(0, j + points_.across - 1);
    return left > 0 ? ceil_div(left, columns.stride) : 0;
  }

  // With zeros beyond the border.
  const BFloat16* copy(const BFloat16* x_row, int64_t column, int64_t slot) {
    BFloat16* const to = copies_ + slot * points_.values;
    __builtin_memset(to, 0, points_.values * sizeof *to);
    for (int64_t j = 0; j < points_.across; ++j, column += op_.columns.dilation)
      if (op_.columns.inside(column))
        __builtin_memcpy(to + j * op_.inputs, x_row + column * op_.inputs, op_.inputs * sizeof *to);
    return to;
  }

  const ConvDweight& op_;
  const Points points_;
  const int64_t pitch_;
  const BFloat16** const begin_;  // (points and dy, pitch)
  BFloat16* const copies_;        // (points, pitch, values)
  const BFloat16* zeros_;
};

#if defined(__AVX512BW__)

// to[2 * i] = one[i], to[2 * i + 1] = other[i]; 0 from `count` on.
FUSEDRES_INLINE void place_pair(const BFloat16* one, const BFloat16* other, int64_t count, BFloat16* to) {
  typedef uint16_t Values __attribute__((vector_size(64)));
  Values low{}, high{};
  for (int i = 0; i < 32; ++i) {
    low[i] = static_cast<uint16_t>(i % 2 * 32 + i / 2);
    high[i] = static_cast<uint16_t>(low[i] + 16);
  }
  const auto lanes = static_cast<__mmask32>((uint64_t{1} << count) - 1);
  const __m512i a = _mm512_maskz_loadu_epi16(lanes, one), b = _mm512_maskz_loadu_epi16(lanes, other);
  _mm512_store_si512(to, _mm512_permutex2var_epi16(a, bit_cast<__m512i>(low), b));
  _mm512_store_si512(to + kPairValues / 2, _mm512_permutex2var_epi16(a, bit_cast<__m512i>(high), b));
}

// Of every square of 2 * kHalf rows and words, the upper right quarter goes where the lower left one is, and
// that one there.
template <int kHalf>
FUSEDRES_INLINE void exchange_quarters(__m512i (&rows)[16]) {
  Words upper{}, lower{};
  for (int i = 0; i < 16; ++i) {
    upper[i] = i & kHalf ? 16 + i - kHalf : i;
    lower[i] = i & kHalf ? 16 + i : i + kHalf;
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    if (i & kHalf) continue;
    const __m512i a = rows[i], b = rows[i + kHalf];
    rows[i] = _mm512_permutex2var_epi32(a, bit_cast<__m512i>(upper), b);
    rows[i + kHalf] = _mm512_permutex2var_epi32(a, bit_cast<__m512i>(lower), b);
  }
}

// A tile's pairs become columns: those of one channel a row.
FUSEDRES_INLINE void turn(BFloat16* tile) {
  __m512i rows[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) rows[i] = _mm512_load_si512(tile + i * kPairValues);
  exchange_quarters<8>(rows);
  exchange_quarters<4>(rows);
  exchange_quarters<2>(rows);
  exchange_quarters<1>(rows);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm512_store_si512(tile + i * kPairValues, rows[i]);
}

#else

inline void place_pair(const BFloat16* one, const BFloat16* other, int64_t count, BFloat16* to) {
  for (int64_t i = 0; i < kSlice; ++i) {
    to[2 * i] = i < count ? one[i] : BFloat16{};
    to[2 * i + 1] = i < count ? other[i] : BFloat16{};
  }
}

inline void turn(BFloat16* tile) {
  auto exchange = [](BFloat16& a, BFloat16& b) {
    const BFloat16 before = a;
    a = b;
    b = before;
  };
  for (int64_t pair = 0; pair < kStepPairs; ++pair)
    for (int64_t channel = 0; channel < pair; ++channel)
      for (int64_t pixel = 0; pixel < 2; ++pixel)
        exchange(tile[pair * kPairValues + 2 * channel + pixel],
                 tile[channel * kPairValues + 2 * pair + pixel]);
}

#endif

constexpr int64_t kAhead = 8;  // pairs, which come into the cache meanwhile

// What of some neighbouring slices is still to be placed, pair by pair.
class Placing {
 public:
  Placing() = default;
  // `pitch` is from a slice to the next one.
  Placing(const BFloat16* const* pixels, int64_t channel, int64_t channels, int64_t steps, BFloat16* to,
          int64_t pitch)
      : pixels_(pixels),
        channel_(channel),
        end_(channel + channels),
        left_(steps * kStepPairs),
        to_(to),
        pitch_(pitch) {}

  int64_t left() const { return left_; }

  FUSEDRES_INLINE void place(int64_t pairs) {
    for (int64_t i = minimum(pairs, left_); i > 0; --i, --left_, pixels_ += 2, to_ += kPairValues) {
      const BFloat16 *const one = pixels_[0], *const other = pixels_[1];
      const BFloat16* const* const ahead = pixels_ + 2 * minimum(kAhead, left_ - 1);
      const BFloat16 *const one_ahead = ahead[0], *const other_ahead = ahead[1];
      BFloat16* to = to_;
      auto place = [&](int64_t channel, int64_t count) FUSEDRES_INLINE_LAMBDA {
        __builtin_prefetch(one_ahead + channel);
        __builtin_prefetch(other_ahead + channel);
        place_pair(one + channel, other + channel, count, to);
      };
      int64_t channel = channel_;
      for (; channel + kSlice <= end_; channel += kSlice, to += pitch_) place(channel, kSlice);
      if (channel < end_) place(channel, end_ - channel);
    }
  }

 private:
  const BFloat16* const* pixels_ = nullptr;
  int64_t channel_ = 0, end_ = 0, left_ = 0;
  BFloat16* to_ = nullptr;
  int64_t pitch_ = 0;
};

}  // namespace fusedres::FUSEDRES_ISA

#include "activation.h"
#include "conv_act.h"
#include "conv_repack.h"
#include "pieces.h"

namespace fusedres::FUSEDRES_ISA {
namespace {

constexpr int kLanes = Vec<float>::kLanes;
constexpr int64_t kWidth = ConvWeights::kWidth;

// How y is cut into tiles, numbered row by row and image by image.
struct Tiles {
  int64_t side;
  int64_t rows;
  int64_t columns;
  int64_t count;

  explicit Tiles(const ConvAct& op)
      : side(op.tile),
        rows(ceil_div(op.rows.outputs, side)),
        columns(ceil_div(op.columns.outputs, side)),
        count(op.images * rows * columns) {}

  struct Place {
    int64_t image;
    int64_t row;  // of y
    int64_t column;
  };
  Place place(int64_t tile) const {
    const int64_t row = tile / columns;
    return {row / rows, row % rows * side, tile % columns * side};
  }
};

// Some tiles at once: x's, transformed, and the products of one block of channels.
constexpr int64_t kScratchBytes = int64_t{768} << 10;
constexpr int64_t kFewestTiles = 24, kMostTiles = 96;
// Weights that are transformed for every patch are worth more tiles, which come from the third-level cache.
constexpr int64_t kFreshScratchBytes = int64_t{3} << 20;
// Weights of a block that are more than this come from memory again and again: for more tiles, then.
constexpr int64_t kWeightBytes = int64_t{2} << 20;
constexpr int64_t kFewestTilesOfThem = 72;
// Fewer are an even number of one size, so that threads get equal shares; of more the registers are better
// filled.
constexpr int64_t kFewPatches = 8;
// Between the points' arrays: they shall not fall on each other in the cache.
constexpr int64_t kGap = 16;

int64_t tiles_at_once(const Tiles& tiles, int64_t points, int64_t inputs, bool fresh) {
  const int64_t bytes = points * (inputs + kWidth) * int64_t{sizeof(float)};
  const bool large = points * inputs * kWidth * int64_t{sizeof(float)} > kWeightBytes;
  const int64_t fewest = large ? kFewestTilesOfThem : kFewestTiles;
  const int64_t most = fresh ? maximum(kFewestTiles, minimum(kMostTiles, kFreshScratchBytes / bytes))
                             : maximum(fewest, minimum(kMostTiles, kScratchBytes / bytes));
  int64_t patches = ceil_div(tiles.count, most);
  if (patches > 1 && patches < kFewPatches) patches += patches % 2;
  const int64_t multiple = patches < kFewPatches ? 4 : kRows;
  return ceil_div(ceil_div(tiles.count, patches), multiple) * multiple;
}

// Winograd's form of a block's weights, where it was packed.
template <class T, int kTile>
class PackedPoints {
  static constexpr int kSide = Winograd<kTile>::kPoints;

 public:
  static constexpr bool kFresh = false;

  PackedPoints(const ConvAct& op, Arena&)
      : shape_(weights_of(op)),
        direct_(static_cast<const T*>(op.weights)),
        points_(reinterpret_cast<const float*>(direct_ + shape_.direct(1, 0))) {}

  int64_t most_inputs() const { return shape_.inputs; }
  int64_t apart() const { return shape_.winograd(1, 0); }
  void place(int64_t block, int64_t, int64_t) { block_ = block; }
  const float* row(int row) const { return points_ + shape_.winograd(row * kSide, block_); }
  const T* direct(int64_t block, Arena&) const { return direct_ + shape_.direct(0, block); }

 private:
  const ConvWeights shape_;
  const T* const direct_;
  const float* const points_;
  int64_t block_ = 0;
};

// The same, made of a weight as it lies.
template <class T, int kTile>
struct PlainPoints : FreshPoints<T, kTile> {
  PlainPoints(const ConvAct& op, Arena& arena) : FreshPoints<T, kTile>({weights_of(op), op.plain}, arena) {}
};

template <class T, int kTile, class Points>
class Patch {
  using W = Winograd<kTile>;
  static constexpr int kSide = W::kPoints;

 public:
  Patch(const ConvAct& op, int64_t most, Arena& arena)
      : op_(op),
        weights_(weights_of(op)),
        points_(op, arena),
        tiles_(op),
        inputs_(ceil_div(op.inputs, kLanes) * kLanes),
        point_(most * inputs_ + kGap),
        product_(most * kWidth + kGap),
        transformed_(arena.take<float>(kSide * kSide * point_)),
        products_(arena.take<float>(kSide * kSide * product_)),
        begin_(arena.take<const float*>(most + kRows)),
        again_(op, kTile, arena) {
    for (int64_t i = 0; i < most + kRows; ++i) begin_[i] = transformed_ + minimum(i, most - 1) * inputs_;
  }

  // B^T d B of the tiles. Reads x, writes (point, tile, channel).
  void place(int64_t first, int64_t count) {
    first_ = first;
    count_ = count;
    for (int64_t i = 0; i < count; ++i) {
      const Window window = window_of(tiles_.place(first + i));
      for (int64_t channel = 0; channel < op_.inputs; channel += kLanes) {
        float* const to = transformed_ + i * inputs_ + channel;
        if (channel + kLanes <= op_.inputs)
          transform(window, channel, to, AllLanes{});
        else
          transform(window, channel, to, FirstLanes{static_cast<int>(op_.inputs - channel)});
      }
    }
  }

  // y's block of channels.
  void compute(int64_t block, bool is_first) {
    const int64_t width = weights_.width(block), most = points_.most_inputs();
    const bool fetches = !Points::kFresh && is_first;  // later patches find weights in the cache
    for (int64_t first = 0; first < op_.inputs; first += most) {
      const int64_t inputs = minimum(most, op_.inputs - first);
      points_.place(block, first, inputs);
      for (int row = 0; row < kSide; ++row) {
        const float* weights = points_.row(row);
        for (int point = row * kSide; point < (row + 1) * kSide; ++point, weights += points_.apart()) {
          const float* const next =
              fetches && point + 1 < kSide * kSide ? weights + points_.apart() : nullptr;
          float* const products = products_ + point * product_;
          const ConvRows<float> rows{begin_, 0, point * point_ + first, 1, inputs, next};
          const ConvResult<float> to{nullptr,       first ? products : nullptr, products, kWidth, width,
                                     Act::kIdentity};
          conv_block(rows, weights, width, to, count_);
        }
      }
    }
    for (int64_t i = 0; i < count_; ++i) finish(i, block);
  }

 private:
  // Where the pixels that a tile is made of lie: null beyond the border.
  struct Window {
    const T* pixels[kSide][kSide];
  };

  Window window_of(typename Tiles::Place at) const {
    const ConvAxis &rows = op_.rows, &columns = op_.columns;
    Window window;
    for (int i = 0; i < kSide; ++i)
      for (int j = 0; j < kSide; ++j) {
        const int64_t row = rows.place(at.row, i), column = columns.place(at.column, j);
        const T* const x = static_cast<const T*>(op_.x);
        window.pixels[i][j] = rows.inside(row) && columns.inside(column)
                                  ? x + ((at.image * rows.size + row) * columns.size + column) * op_.inputs
                                  : nullptr;
      }
    return window;
  }

  template <class Lanes>
  void transform(const Window& window, int64_t channel, float* to, Lanes lanes) const {
    Vec<float> half[kSide][kSide];  // (point, column)
    for (int j = 0; j < kSide; ++j) {
      Vec<float> d[kSide], t[kSide];
#pragma GCC unroll 9
      for (int i = 0; i < kSide; ++i) {
        const T* const pixel = window.pixels[i][j];
        d[i] = pixel ? load(pixel + channel, lanes) : Vec<float>{};
      }
      W::input(d, t);
#pragma GCC unroll 9
      for (int i = 0; i < kSide; ++i) half[i][j] = t[i];
    }
    for (int i = 0; i < kSide; ++i) {
      Vec<float> t[kSide];
      W::input(half[i], t);
#pragma GCC unroll 9
      for (int j = 0; j < kSide; ++j) store(to + (i * kSide + j) * point_, t[j]);
    }
  }

  // A^T m A of one tile, and the epilogue. A value of x that is not finite has then spoilt its neighbours,
  // and sums of very large ones may have overflowed: such a tile is computed again, directly.
  void finish(int64_t i, int64_t block) const {
    const typename Tiles::Place at = tiles_.place(first_ + i);
    const int64_t rows = minimum<int64_t>(kTile, op_.rows.outputs - at.row);
    const int64_t columns = minimum<int64_t>(kTile, op_.columns.outputs - at.column);
    const int64_t pixel = (at.image * op_.rows.outputs + at.row) * op_.columns.outputs + at.column;
    const ConvResult<T> to = result_of<T>(op_, pixel, 0, block);
    Vec<float> y[kWidth / kLanes][kTile][kTile];
    const Vec<float> zero{};
    Vec<float> infinities{};  // NaN where a value is not finite
    for (int64_t channel = 0; channel < to.channels; channel += kLanes) {
      auto& of = y[channel / kLanes];
      inverse(products_ + i * kWidth + channel, of);
      for (int row = 0; row < kTile; ++row)
        for (int column = 0; column < kTile; ++column)
          infinities = multiply_add(of[row][column], zero, infinities);
    }
    if (bits_above(infinities, 0.0f)) return compute_again(pixel, rows, columns, block);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t column = 0; column < columns; ++column)
        for (int64_t channel = 0; channel < to.channels; channel += kLanes) {
          const Vec<float> sum = y[channel / kLanes][row][column];
          const int64_t place = row * op_.columns.outputs + column;
          auto write = [&](auto lanes) FUSEDRES_INLINE_LAMBDA {
            Vec<float> z = conv_epilogue(sum, to, place, channel, lanes);
            if (to.act == Act::kRelu)
              z = Relu::value(z);
            else if (to.act != Act::kIdentity)
              z = activate(to.act, z);
            store(to.y + place * to.stride + channel, z, lanes);
          };
          if (channel + kLanes <= to.channels)
            write(AllLanes{});
          else
            write(FirstLanes{static_cast<int>(to.channels - channel)});
        }
  }

  FUSEDRES_INLINE void inverse(const float* from, Vec<float> (&y)[kTile][kTile]) const {
    Vec<float> half[kTile][kSide];
    for (int j = 0; j < kSide; ++j) {
      Vec<float> m[kSide], t[kTile];
#pragma GCC unroll 9
      for (int i = 0; i < kSide; ++i) m[i] = load(from + (i * kSide + j) * product_, AllLanes{});
      W::output(m, t);
#pragma GCC unroll 9
      for (int i = 0; i < kTile; ++i) half[i][j] = t[i];
    }
    for (int i = 0; i < kTile; ++i) W::output(half[i], y[i]);
  }

  void compute_again(int64_t pixel, int64_t rows, int64_t columns, int64_t block) const {
    Arena arena;
    const T* const weights = points_.direct(block, arena);
    for (int64_t row = 0; row < rows; ++row) {
      again_.place(pixel + row * op_.columns.outputs, columns);
      again_.compute(0, block, weights);
    }
  }

  const ConvAct& op_;
  const ConvWeights weights_;
  Points points_;
  const Tiles tiles_;
  const int64_t inputs_;   // up to whole vectors
  const int64_t point_;    // from one point's transformed values to the next one's
  const int64_t product_;  // from one point's products to the next one's
  float* transformed_;     // (points, tiles, inputs)
  float* products_;        // (points, tiles, kWidth)
  const float** begin_;    // (tiles,)
  mutable TileOf<T> again_;
  int64_t first_ = 0;
  int64_t count_ = 0;
};

template <class T, int kTile, class Points>
void winograd(const ConvAct& op) {
  constexpr int64_t kPoints = Winograd<kTile>::kPoints * Winograd<kTile>::kPoints;
  const Tiles tiles(op);
  const int64_t blocks = weights_of(op).blocks(),
                most = tiles_at_once(tiles, kPoints, op.inputs, Points::kFresh);
  share_out(ceil_div(tiles.count, most) * blocks, most * kPoints * op.inputs, [&](Pieces::Taker& pieces) {
    Arena arena;
    Patch<T, kTile, Points> patch(op, most, arena);
    int64_t placed = -1;
    bool is_first = true;
    for (int64_t i = pieces.next(); i >= 0; i = pieces.next()) {
      const int64_t first = i / blocks * most;
      if (first != placed) {
        is_first = placed < 0;
        patch.place(first, minimum(most, tiles.count - first));
      }
      placed = first;
      patch.compute(i % blocks, is_first);
    }
  });
}

template <class T, int kTile>
void winograd(const ConvAct& op) {
  if (op.weights)
    winograd<T, kTile, PackedPoints<T, kTile>>(op);
  else
    winograd<T, kTile, PlainPoints<T, kTile>>(op);
}

}  // namespace

// Patch by patch of tiles, each with all channels: one matrix product a point of the transformed tile, in
// place of as many as the window has values a pixel of y. All but x, the residual and y is in float32.
template <class T>
void conv_winograd(const ConvAct& op) {
  if (op.tile == 2)
    winograd<T, 2>(op);
  else if (op.tile == 4)
    winograd<T, 4>(op);
  else
    winograd<T, 7>(op);
}

#if !defined(__AVX512BF16__)
template void conv_winograd<float>(const ConvAct&);
#endif
template void conv_winograd<BFloat16>(const ConvAct&);

}  // namespace fusedres::FUSEDRES_ISA

#include "conv_act.h"
#include "pieces.h"

#include "isa.h"

#if defined(FUSEDRES_TILES)
#include "tiles.h"
#endif

namespace fusedres::FUSEDRES_ISA {
namespace {

#if defined(FUSEDRES_TILES)
constexpr bool kTiles = true;
#else
constexpr bool kTiles = false;
constexpr int64_t kTileRows = 1, kTileInputs = 1;
#endif

// Pixels of x whose distance is a multiple of this fall into the same few places of the first-level cache.
constexpr int64_t kPageBytes = 4096;
// Between copies, so that they don't.
constexpr int64_t kCopyGap = 16;

bool reads_copied(const ConvAct& op) {
  if (weights_of(op).flat() && op.columns.dilation > 1) return true;
  const int64_t pixel_bytes = op.columns.stride * op.inputs * size_of(op.dtype);
  return op.groups == 1 && op.rows.kernel * op.columns.kernel <= 9 && pixel_bytes % kPageBytes == 0;
}

constexpr int64_t kTileBytes = int64_t{512} << 10;  // of x under a tile
constexpr int64_t kFewestPixels = 96, kMostPixels = 480;
constexpr int64_t kKeptBytes = int64_t{8} << 10;  // of a block's weights, which the first-level cache keeps

// Large enough that weights are read seldom, small enough that x stays in the second-level cache.
template <class T>
int64_t tile_pixels(const ConvAct& op, int64_t pixels) {
  const int64_t bytes = kWidens<T> ? WidenedTile<T>::bytes(op)
                                   : op.inputs * op.rows.stride * op.columns.stride * size_of(op.dtype);
  const int64_t most = maximum(kFewestPixels, minimum(kMostPixels, kTileBytes / bytes));
  const int64_t tiles = maximum<int64_t>(1, (pixels + most / 2) / most);
  return ceil_div(ceil_div(pixels, tiles), kRows) * kRows;
}

}  // namespace

template <class T>
ConvTile<T>::ConvTile(const ConvAct& op, int64_t most_pixels, Arena& arena)
    : op_(op),
      weights_(weights_of(op)),
      flat_(weights_.flat()),
      copied_(reads_copied(op)),
      taps_(weights_.taps()),
      run_(weights_.run()),
      aligned_(ceil_div(run_, kTileInputs) * kTileInputs),
      pitch_(ceil_div(most_pixels, kRows) * kRows),
      begin_(arena.take<const T*>((taps_ + 1) * pitch_)),
      zeros_(arena.template take<T>(maximum(run_, op.inputs))),
      copies_(flat_ || copied_ || kTiles ? arena.template take<T>(taps_ * pitch_ * (aligned_ + kCopyGap))
                                         : nullptr),
      widened_(aligned_ > run_ ? arena.template take<T>(taps_ * aligned_ * ConvWeights::kWidth) : nullptr),
      products_(op, most_pixels, arena) {
  for (int64_t i = 0; i < maximum(run_, op.inputs); ++i) zeros_[i] = T{};
  for (int64_t i = 0; i < pitch_; ++i) begin_[taps_ * pitch_ + i] = zeros_;
}

template <class T>
void ConvTile<T>::place(int64_t pixel, int64_t count) {
  pixel_ = pixel;
  count_ = count;
  const ConvAxis &rows = op_.rows, &columns = op_.columns;
  const int64_t image_size = rows.size * columns.size * op_.inputs;
  int64_t column = pixel % columns.outputs, row = pixel / columns.outputs;
  for (int64_t i = 0; i < count; ++row, column = 0) {
    const int64_t end = minimum(columns.outputs, column + count - i);
    place_row(static_cast<const T*>(op_.x) + row / rows.outputs * image_size, row % rows.outputs, column, end,
              begin_ + i);
    i += end - column;
  }
  for (int64_t tap = 0; tap < taps_; ++tap)
    for (int64_t i = count; i < ceil_div(count, kRows) * kRows; ++i) begin_[tap * pitch_ + i] = zeros_;
  if constexpr (kTiles) align_rows();
}

// Copies those 16 rows of a tap that don't lie at equal distances, and runs that are no whole steps.
template <class T>
void ConvTile<T>::align_rows() {
  auto place = [](const T* p) { return reinterpret_cast<intptr_t>(p); };
  for (int64_t tap = 0; tap < taps_; ++tap)
    for (int64_t first = 0; first < ceil_div(count_, kRows) * kRows; first += kTileRows) {
      const T** const rows = begin_ + tap * pitch_ + first;
      bool even = aligned_ == run_;
      for (int64_t i = 2; i < kTileRows; ++i)
        even &= place(rows[i]) - place(rows[i - 1]) == place(rows[1]) - place(rows[0]);
      if (even) continue;
      for (int64_t i = 0; i < kTileRows; ++i) {
        T* const copy = copies_ + (rows + i - begin_) * (aligned_ + kCopyGap);
        for (int64_t k = 0; k < aligned_; ++k) copy[k] = k < run_ ? rows[i][k] : T{};
        rows[i] = copy;
      }
    }
}

// A block's weights with zeros for what fills the steps.
template <class T>
const T* ConvTile<T>::widened(const T* weights, int64_t width) const {
  if (aligned_ == run_) return weights;
  const int64_t packed = weights_.steps() * weights_.step() * width;
  T* to = widened_;
  for (int64_t tap = 0; tap < taps_; ++tap, weights += packed)
    for (int64_t k = 0; k < aligned_ * width; ++k) *to++ = k < packed ? weights[k] : T{};
  return widened_;
}

// The windows of columns [begin, end) in a row of y: those inside an image's row lie at equal distances.
template <class T>
void ConvTile<T>::place_row(const T* image, int64_t row, int64_t begin, int64_t end, const T** to) {
  const ConvAxis &rows = op_.rows, &columns = op_.columns;
  const int64_t last = columns.kernel - 1;
  int64_t first_inside = begin, end_inside = end;
  while (first_inside < end && columns.place(first_inside, 0) < 0) ++first_inside;
  while (end_inside > first_inside && !columns.inside(columns.place(end_inside - 1, last))) --end_inside;
  if (copied_ || !rows.inside(rows.place(row, 0)) || !rows.inside(rows.place(row, rows.kernel - 1)))
    end_inside = first_inside;
  auto place_each = [&](int64_t column, int64_t last_column) {
    for (; column < last_column; ++column)
      place_window(image, rows.place(row, 0), columns.place(column, 0), to + (column - begin));
  };
  place_each(begin, first_inside);
  place_each(end_inside, end);
  if (first_inside == end_inside) return;
  const int64_t across = flat_ ? 1 : columns.kernel, distance = columns.stride * op_.inputs;
  const T** place = to + (first_inside - begin);
  for (int64_t i = 0; i < rows.kernel; ++i)
    for (int64_t j = 0; j < across; ++j, place += pitch_) {
      const T* x = image + (rows.place(row, i) * columns.size + columns.place(first_inside, j)) * op_.inputs;
      for (int64_t k = 0; k < end_inside - first_inside; ++k) place[k] = x + k * distance;
    }
}

// The taps of the window that begins in this row and column of an image.
template <class T>
void ConvTile<T>::place_window(const T* image, int64_t row, int64_t column, const T** to) {
  const ConvAxis &rows = op_.rows, &columns = op_.columns;
  const int64_t row_length = columns.size * op_.inputs, across = flat_ ? 1 : columns.kernel;
  for (int64_t i = 0; i < rows.kernel; ++i, row += rows.dilation)
    for (int64_t j = 0; j < across; ++j, to += pitch_)
      *to = rows.inside(row) ? tap(image + row * row_length, column + j * columns.dilation, to - begin_)
                             : zeros_;
}

// One tap in a row of x: as it lies there, or a copy.
template <class T>
const T* ConvTile<T>::tap(const T* x_row, int64_t column, int64_t slot) const {
  const ConvAxis& columns = op_.columns;
  const int64_t inputs = op_.inputs, across = flat_ ? columns.kernel : 1,
                last = (across - 1) * columns.dilation;
  const bool whole = columns.inside(column) && columns.inside(column + last);
  if (whole && !copied_) return x_row + column * inputs;
  if (!whole && !flat_) return zeros_;
  T* const copy = copies_ + slot * (aligned_ + kCopyGap);
  for (int64_t j = 0; j < across; ++j) {
    const int64_t from = column + j * columns.dilation;
    for (int64_t i = 0; i < inputs; ++i)
      copy[j * inputs + i] = columns.inside(from) ? x_row[from * inputs + i] : T{};
  }
  return copy;
}

template <class T>
void ConvTile<T>::compute(int64_t group, int64_t block, const T* weights, const T* next_weights,
                          bool cold) const {
  const ConvRows<T> rows{begin_, pitch_,         weights_.source(group, block), taps_, aligned_, next_weights,
                         cold,   weights_.bundle};
  const int64_t width = weights_.width(block);
  products_.compute(rows, widened(weights, width), width, group, block, pixel_, count_);
}

// Tile by tile of y's pixels, each with all channels: x stays in the second-level cache, and from there or
// the one below comes a block of weights per tile. Threads share both.
template <class T>
void conv_direct(const ConvAct& op) {
  const ConvWeights weights = weights_of(op);
  const int64_t pixels = op.images * op.rows.outputs * op.columns.outputs;
  const int64_t tile = tile_pixels<T>(op, pixels), blocks = weights.groups * weights.blocks();
  const bool fetches = weights.direct(0, 1) * size_of(op.dtype) > kKeptBytes;
  auto weights_at = [&](int64_t block) {
    return static_cast<const T*>(op.weights) +
           weights.direct(block / weights.blocks(), block % weights.blocks());
  };
  share_out(ceil_div(pixels, tile) * blocks, tile * weights.depth(), [&](Pieces::Taker& pieces) {
    Arena arena;
    TileOf<T> at(op, tile, arena);
    int64_t placed = -1;
    for (int64_t i = pieces.next(); i >= 0; i = pieces.next()) {
      const int64_t first = i / blocks * tile, block = i % blocks;
      const bool is_first = first != placed;
      if (is_first) at.place(first, minimum(tile, pixels - first));
      placed = first;
      const int64_t group = block / weights.blocks(), of_group = block % weights.blocks();
      const T* const next = fetches ? weights_at((i + 1) % blocks) : nullptr;
      at.compute(group, of_group, weights_at(block), next, is_first || of_group == 0);
    }
  });
}

#if defined(FUSEDRES_TILES)

void conv_act(const ConvAct& op) {
  if (op.groups > 1 || op.tile > 1) return FUSEDRES_BESIDE_TILES::conv_act(op);
  if (op.images > 0) conv_direct<BFloat16>(op);
}

#else

template <class T>
void conv_act_of(const ConvAct& op) {
  if (op.tile > 1)
    conv_winograd<T>(op);
  else
    conv_direct<T>(op);
}

template class ConvTile<float>;
#if defined(__AVX512BF16__) && !defined(FUSEDRES_WIDENED)
template class ConvTile<BFloat16>;
#endif

void conv_act(const ConvAct& op) {
  if (op.images == 0) return;
#if defined(__AVX512BF16__) && !defined(FUSEDRES_WIDENED)
  if (weights_of(op).bundle)
    return avx512_widened::conv_act(op);  // lanes of float32 change places, not pairs
#endif
#if !defined(__AVX512BF16__)
  if (op.dtype == DType::kFloat32) return conv_act_of<float>(op);
#endif
  conv_act_of<BFloat16>(op);
}

#endif

}  // namespace fusedres::FUSEDRES_ISA

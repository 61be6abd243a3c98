#include "conv_act.h"

namespace fusedres::FUSEDRES_ISA {
namespace {

// Pixels of x whose distance is a multiple of this fall into the same few places of the first-level cache.
constexpr int64_t kPageBytes = 4096;
// Between copies, so that they don't.
constexpr int64_t kCopyGap = 16;

// With few channels a window's row of values is longer than one value's channels.
bool reads_flat(const ConvAct& op) {
  return op.groups == 1 && op.columns.dilation == 1 && op.columns.kernel > 1 &&
         op.inputs < ConvWeights::kPanel;
}

bool reads_copied(const ConvAct& op) {
  const int64_t pixel_bytes = op.columns.stride * op.inputs * int64_t{sizeof(float)};
  return op.groups == 1 && op.rows.kernel * op.columns.kernel <= 9 && pixel_bytes % kPageBytes == 0;
}

constexpr int64_t kTileBytes = int64_t{256} << 10;  // of x under a tile
constexpr int64_t kFewestPixels = 96, kMostPixels = 480;

// Large enough that weights are read seldom, small enough that x stays in the second-level cache.
int64_t tile_pixels(const ConvAct& op, int64_t pixels) {
  const int64_t bytes = op.inputs * op.rows.stride * op.columns.stride * int64_t{sizeof(float)};
  const int64_t most = maximum(kFewestPixels, minimum(kMostPixels, kTileBytes / bytes));
  const int64_t tiles = maximum<int64_t>(1, (pixels + most / 2) / most);
  return ceil_div(ceil_div(pixels, tiles), kRows) * kRows;
}

}  // namespace

ConvTile::ConvTile(const ConvAct& op, int64_t most_pixels, Arena& arena)
    : op_(op),
      weights_(weights_of(op)),
      flat_(reads_flat(op)),
      copied_(reads_copied(op)),
      taps_(flat_ ? op.rows.kernel : op.rows.kernel * op.columns.kernel),
      run_(flat_ ? op.columns.kernel * op.inputs : op.inputs / op.groups),
      pitch_(ceil_div(most_pixels, kRows) * kRows),
      begin_(arena.take<const float*>((taps_ + 1) * pitch_)),
      zeros_(arena.take<float>(maximum(run_, op.inputs))),
      copies_(flat_ || copied_ ? arena.take<float>(taps_ * pitch_ * (run_ + kCopyGap)) : nullptr) {
  for (int64_t i = 0; i < maximum(run_, op.inputs); ++i) zeros_[i] = 0;
  for (int64_t i = 0; i < pitch_; ++i) begin_[taps_ * pitch_ + i] = zeros_;
}

void ConvTile::place(int64_t pixel, int64_t count) {
  pixel_ = pixel;
  count_ = count;
  const ConvAxis &rows = op_.rows, &columns = op_.columns;
  int64_t column = pixel % columns.outputs, row = pixel / columns.outputs;
  int64_t image = row / rows.outputs;
  row %= rows.outputs;
  for (int64_t i = 0; i < count; ++i) {
    place_window(op_.x + image * rows.size * columns.size * op_.inputs, rows.place(row, 0),
                 columns.place(column, 0), begin_ + i);
    if (++column < columns.outputs) continue;
    column = 0;
    if (++row < rows.outputs) continue;
    row = 0;
    ++image;
  }
  for (int64_t tap = 0; tap < taps_; ++tap)
    for (int64_t i = count; i < ceil_div(count, kRows) * kRows; ++i) begin_[tap * pitch_ + i] = zeros_;
}

// The taps of the window that begins in this row and column of an image.
void ConvTile::place_window(const float* image, int64_t row, int64_t column, const float** to) {
  const ConvAxis &rows = op_.rows, &columns = op_.columns;
  const int64_t row_length = columns.size * op_.inputs, across = flat_ ? 1 : columns.kernel;
  if (!copied_ && rows.inside(row) && rows.inside(row + (rows.kernel - 1) * rows.dilation) &&
      columns.inside(column) && columns.inside(column + (columns.kernel - 1) * columns.dilation)) {
    const float* x = image + row * row_length + column * op_.inputs;
    for (int64_t i = 0; i < rows.kernel; ++i, x += rows.dilation * row_length)
      for (int64_t j = 0; j < across; ++j, to += pitch_) *to = x + j * columns.dilation * op_.inputs;
    return;
  }
  for (int64_t i = 0; i < rows.kernel; ++i, row += rows.dilation)
    for (int64_t j = 0; j < across; ++j, to += pitch_)
      *to = rows.inside(row) ? tap(image + row * row_length, column + j * columns.dilation, to - begin_)
                             : zeros_;
}

// One tap in a row of x: as it lies there, or a copy.
const float* ConvTile::tap(const float* x_row, int64_t column, int64_t slot) const {
  const int64_t begin = column * op_.inputs, end = op_.columns.size * op_.inputs;
  const bool whole = 0 <= begin && begin + run_ <= end;
  if (whole && !copied_) return x_row + begin;
  if (!whole && !flat_) return zeros_;
  float* const copy = copies_ + slot * (run_ + kCopyGap);
  for (int64_t i = 0; i < run_; ++i) copy[i] = 0 <= begin + i && begin + i < end ? x_row[begin + i] : 0;
  return copy;
}

void ConvTile::compute(int64_t group, int64_t block) const {
  const ConvRows rows{begin_, pitch_, group * (op_.inputs / op_.groups), taps_, run_};
  conv_block(rows, op_.weights + weights_.direct(group, block), weights_.width(block),
             result_of(op_, pixel_, group, block), count_);
}

// Tile by tile of y's pixels, each with all channels: x stays in the second-level cache, and from there or
// the one below comes a block of weights per tile. Both are cut between threads.
void conv_direct(const ConvAct& op) {
  const ConvWeights weights = weights_of(op);
  const int64_t pixels = op.images * op.rows.outputs * op.columns.outputs;
  const int64_t tile = tile_pixels(op, pixels), blocks = op.groups * weights.blocks();
  parallel(ceil_div(pixels, tile) * blocks, tile * weights.depth(), [&](int64_t begin, int64_t end) {
    Arena arena;
    ConvTile at(op, tile, arena);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i / blocks * tile, block = i % blocks;
      if (i == begin || block == 0) at.place(first, minimum(tile, pixels - first));
      at.compute(block / weights.blocks(), block % weights.blocks());
    }
  });
}

void conv_act(const ConvAct& op) {
  if (op.images == 0) return;
  if (op.tile > 1)
    conv_winograd(op);
  else
    conv_direct(op);
}

}  // namespace fusedres::FUSEDRES_ISA

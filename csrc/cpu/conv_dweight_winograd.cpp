#include <atomic>

#include "conv_dweight.h"
#include "conv_dweight_groups.h"
#include "pieces.h"
#include "winograd.h"

namespace fusedres::FUSEDRES_ISA {
namespace {

constexpr int kLanes = Vec<float>::kLanes;
constexpr int64_t kBlock = 2 * kPanel;               // channels of dy, and of x, that a block of dweight has
constexpr int64_t kScratchBytes = int64_t{3} << 20;  // of a thread's steps
constexpr int64_t kFewestSteps = 32, kMostSteps = 128, kFewChannels = 128;
static_assert(kFewestSteps >= 2 * Groups::kMost, "a group would be left without steps");

// A step is one tile of dy, and what of x its windows see. At every point of the transformed tile dweight is
// a product of matrices, summed over some steps in registers, over more in cache, and over all in dweight.
//
// Threads share nothing: each has its group of runs of steps, or its part of the channels, and transforms for
// itself what it multiplies.
template <class T, int kTile>
class Dweight {
  using W = Winograd<kTile>;
  static constexpr int kSide = W::kPoints, kTaps = 3;
  static constexpr int64_t kPoints = kSide * kSide;
  static constexpr int64_t kSums = kBlock * kBlock + kGap;  // of a point
  // Steps that are added up in one go: a longer sum loses more digits, which bfloat16 doesn't have.
  static constexpr int64_t kTerms = sizeof(T) == sizeof(float) ? 16 : 64;

 public:
  explicit Dweight(const ConvDweight& op)
      : op_(op),
        tile_rows_(ceil_div(op.rows.outputs, kTile)),
        tile_columns_(ceil_div(op.columns.outputs, kTile)),
        tiles_(op.images * tile_rows_ * tile_columns_),
        size_(op.outputs * kTaps * kTaps * op.inputs) {
    const int64_t few = minimum(op.inputs, kFewChannels) + minimum(op.outputs, kFewChannels);
    const int64_t most = maximum(kFewestSteps, minimum(kMostSteps, kScratchBytes / bytes(1, few)));
    groups_ = Groups::count_for(ceil_div(tiles_, most), size_);
    runs_ = ceil_div(ceil_div(tiles_, most), groups_) * groups_;
    steps_ = ceil_div(tiles_, runs_);
    inputs_ = ceil_div(op.inputs, kBlock) * kBlock;
    outputs_ = ceil_div(op.outputs, kBlock) * kBlock;
    while ((bytes(steps_, inputs_ + outputs_) > kScratchBytes || groups_ * parts() < op.threads) &&
           maximum(inputs_, outputs_) > kBlock) {
      int64_t& larger = inputs_ > outputs_ ? inputs_ : outputs_;
      larger = ceil_div(larger, 2 * kBlock) * kBlock;
    }
  }

  // Whether dweight is finite.
  bool run() {
    Arena arena;
    const Groups groups(groups_, size_, op_.dweight, arena);
    for_each_piece(groups_ * parts(), size_ * tiles_, [&](int64_t piece) {
      const int64_t group = piece / parts(), part = piece % parts();
      if (finite_)
        add_part(group, part / parts_of_x() * outputs_, part % parts_of_x() * inputs_, groups.at(group));
    });
    groups.add_up();
    return finite_;
  }

 private:
  static int64_t bytes(int64_t steps, int64_t channels) {
    return kPoints * steps * channels * int64_t{sizeof(float)};
  }
  int64_t parts_of_x() const { return ceil_div(op_.inputs, inputs_); }
  int64_t parts() const { return ceil_div(op_.outputs, outputs_) * parts_of_x(); }

  // Some channels of some steps, transformed.
  struct Operands {
    int64_t output, input;  // the first ones
    Panels<float> dy, x;
  };

  // What a group's steps add to the part of dweight from these channels on.
  void add_part(int64_t group, int64_t output, int64_t input, float* dweight) {
    Arena arena;
    Operands to{output,
                input,
                {minimum(outputs_, op_.outputs - output), steps_, false, nullptr},
                {minimum(inputs_, op_.inputs - input), steps_, false, nullptr}};
    to.dy.begin = arena.take<float>(kPoints * to.dy.point());
    to.x.begin = arena.take<float>(kPoints * to.x.point());
    float* const sums = arena.take<float>(kPoints * kSums);
    const int64_t each = runs_ / groups_ * steps_, begin = group * each;
    const int64_t last = minimum(begin + each, tiles_);
    for (int64_t first = begin; first < last && finite_; first += steps_) {
      const int64_t steps = minimum(steps_, last - first);
      for (int64_t step = 0; step < steps; ++step) place(first + step, step, to);
      for (int64_t o = 0; o < to.dy.channels; o += kBlock)
        for (int64_t i = 0; i < to.x.channels; i += kBlock)
          if (!compute(to, o, i, steps, first == begin, sums, dweight)) finite_ = false;
    }
  }

  // B^T d B of x, A d A^T of dy.
  void place(int64_t tile, int64_t step, const Operands& to) const {
    const int64_t image = tile / tile_columns_ / tile_rows_;
    const int64_t row = tile / tile_columns_ % tile_rows_ * kTile, column = tile % tile_columns_ * kTile;
    const ConvAxis &rows = op_.rows, &columns = op_.columns;
    const T *x[kPoints], *dy[kTile * kTile];  // where the tile's values lie, null beyond the border
    for (int64_t i = 0; i < kSide; ++i)
      for (int64_t j = 0; j < kSide; ++j) {
        const int64_t at_row = rows.place(row, i), at_column = columns.place(column, j);
        const int64_t pixel = (image * rows.size + at_row) * columns.size + at_column;
        x[i * kSide + j] = rows.inside(at_row) && columns.inside(at_column)
                               ? static_cast<const T*>(op_.x) + pixel * op_.inputs + to.input
                               : nullptr;
      }
    for (int64_t i = 0; i < kTile; ++i)
      for (int64_t j = 0; j < kTile; ++j) {
        const int64_t pixel = (image * rows.outputs + row + i) * columns.outputs + column + j;
        dy[i * kTile + j] = row + i < rows.outputs && column + j < columns.outputs
                                ? static_cast<const T*>(op_.dy) + pixel * op_.outputs + to.output
                                : nullptr;
      }
    transform_all<kSide>(to.x, step, x,
                         [](const auto& d, auto& t) FUSEDRES_INLINE_LAMBDA { W::input(d, t); });
    transform_all<kTile>(to.dy, step, dy,
                         [](const auto& d, auto& t) FUSEDRES_INLINE_LAMBDA { W::d_output(d, t); });
  }

  template <int kFrom, class Along>
  FUSEDRES_INLINE static void transform_all(const Panels<float>& to, int64_t step, const T* const* from,
                                            const Along& along) {
    for (int64_t channel = 0; channel < to.count() * kPanel; channel += kLanes)
      if (channel + kLanes <= to.channels)
        transform<kFrom>(to, step, channel, from, along, AllLanes{});
      else
        transform<kFrom>(to, step, channel, from, along,
                         FirstLanes{static_cast<int>(maximum<int64_t>(0, to.channels - channel))});
  }

  // `along` the columns of a square of values, then along the rows.
  template <int kFrom, class Along, class Lanes>
  FUSEDRES_INLINE static void transform(const Panels<float>& to, int64_t step, int64_t channel,
                                        const T* const* from, const Along& along, Lanes lanes) {
    Vec<float> half[kSide][kFrom];
    for (int j = 0; j < kFrom; ++j) {
      Vec<float> d[kFrom], t[kSide];
#pragma GCC unroll 9
      for (int i = 0; i < kFrom; ++i) {
        const T* const p = from[i * kFrom + j];
        d[i] = p ? load(p + channel, lanes) : Vec<float>{};
      }
      along(d, t);
#pragma GCC unroll 9
      for (int i = 0; i < kSide; ++i) half[i][j] = t[i];
    }
    for (int i = 0; i < kSide; ++i) {
      Vec<float> t[kSide];
      along(half[i], t);
#pragma GCC unroll 9
      for (int j = 0; j < kSide; ++j) store(to.at(i * kSide + j, channel, step), t[j]);
    }
  }

  // What these steps add to a block of a part of dweight. Whether all of it is finite.
  bool compute(const Operands& from, int64_t output, int64_t input, int64_t steps, bool fresh, float* sums,
               float* dweight) const {
    const int64_t outputs = minimum(kBlock, from.dy.channels - output);
    const int64_t inputs = minimum(kBlock, from.x.channels - input);
    for (int64_t point = 0; point < kPoints; ++point)
      for (int64_t i = 0; i < inputs; i += kSumColumns)
        for (int64_t o = 0; o < outputs; o += kSumRows) {
          float* const to = sums + point * kSums + o * kBlock + i;
          const float* const next = panel_of_next(from, point, output, input, i * kBlock / kSumColumns + o);
          for (int64_t step = 0; step < steps; step += kTerms)
            multiply(
                from.dy.from(point, output + o, step), from.x.from(point, input + i, step),
                minimum(kTerms, steps - step),
                [=](int64_t later)
                    FUSEDRES_INLINE_LAMBDA { __builtin_prefetch(next + (step + later) * kPanel, 0, 2); },
                [=](int row, int v, Vec<float> sum) FUSEDRES_INLINE_LAMBDA {
                  float* const at = to + row * kBlock + v * kLanes;
                  store(at, step == 0 ? sum : load(at, AllLanes{}) + sum);
                });
        }
    Vec<float> differences{};  // NaN where a value is not finite
    for (int64_t o = 0; o < outputs; ++o)
      for (int64_t i = 0; i < inputs; i += kLanes) {
        float* const to =
            dweight + (from.output + output + o) * kTaps * kTaps * op_.inputs + from.input + input + i;
        const Vec<float> added = i + kLanes <= inputs ? add(sums + o * kBlock + i, to, fresh, AllLanes{})
                                                      : add(sums + o * kBlock + i, to, fresh,
                                                            FirstLanes{static_cast<int>(inputs - i)});
        differences = differences + added;
      }
    return !bits_above(differences, 0.0f);
  }

  // One of the next point's panels, which come into the cache while this point's are multiplied.
  static const float* panel_of_next(const Operands& from, int64_t point, int64_t output, int64_t input,
                                    int64_t turn) {
    const int64_t next = minimum(point + 1, kPoints - 1), second = turn / kSumRows / 2 % 2 * kPanel;
    const bool of_x = turn / kSumRows % 2;
    const Panels<float>& panels = of_x ? from.x : from.dy;
    const int64_t channel = of_x ? input : output;
    return panels.at(next, channel + (channel + second < panels.channels ? second : 0), 0);
  }

  // G^T u G to every tap. Returns 0, or NaN where one is not finite.
  template <class Lanes>
  FUSEDRES_INLINE Vec<float> add(const float* from, float* to, bool fresh, Lanes lanes) const {
    Vec<float> half[kTaps][kSide], differences{};
    for (int j = 0; j < kSide; ++j) {
      Vec<float> u[kSide], w[kTaps];
#pragma GCC unroll 9
      for (int i = 0; i < kSide; ++i) u[i] = load(from + (i * kSide + j) * kSums, AllLanes{});
      W::d_weights(u, w);
#pragma GCC unroll 3
      for (int i = 0; i < kTaps; ++i) half[i][j] = w[i];
    }
    for (int i = 0; i < kTaps; ++i) {
      Vec<float> w[kTaps];
      W::d_weights(half[i], w);
#pragma GCC unroll 3
      for (int j = 0; j < kTaps; ++j, to += op_.inputs) {
        const Vec<float> sum = fresh ? w[j] : w[j] + load(to, lanes);
        store(to, sum, lanes);
        differences = differences + (sum - sum);
      }
    }
    return differences;
  }

  const ConvDweight& op_;
  const int64_t tile_rows_, tile_columns_, tiles_;
  const int64_t size_;        // of dweight
  int64_t steps_;             // of a run
  int64_t runs_, groups_;     // so many runs for each group
  int64_t outputs_, inputs_;  // of a part
  std::atomic<bool> finite_{true};
};

template <class T>
bool run(const ConvDweight& op) {
  return op.tile == 2 ? Dweight<T, 2>(op).run() : Dweight<T, 4>(op).run();
}

}  // namespace

bool conv_dweight_winograd(const ConvDweight& op) {
#if !defined(__AVX512BF16__)
  if (op.dtype == DType::kFloat32) return run<float>(op);
#endif
  return op.tile == 7 ? Dweight<BFloat16, 7>(op).run() : run<BFloat16>(op);
}

}  // namespace fusedres::FUSEDRES_ISA

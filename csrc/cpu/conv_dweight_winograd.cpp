#include <atomic>

#include "conv_dweight.h"
#include "winograd.h"

namespace fusedres::FUSEDRES_ISA {
namespace {

constexpr int kLanes = Vec<float>::kLanes;
constexpr int64_t kBlock = 2 * kPanel;  // channels of dy, and of x, that a block of dweight has
constexpr int64_t kScratchBytes = int64_t{4} << 20;
constexpr int64_t kFewestSteps = 64, kMostSteps = 384;

// A step is one tile of dy, and what of x its windows see. At every point of the transformed tile dweight is
// a product of matrices, summed over some steps in registers, over more in cache, and over all in dweight.
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
        x_{op.inputs, 0, false, nullptr},
        dy_{op.outputs, 0, false, nullptr} {
    const int64_t bytes = kPoints * (x_.count() + dy_.count()) * kPanel * int64_t{sizeof(float)};
    const int64_t most = maximum(kFewestSteps, minimum(kMostSteps, kScratchBytes / bytes));
    x_.steps = dy_.steps = ceil_div(tiles_, ceil_div(tiles_, most));
  }

  // Whether dweight is finite.
  bool run() {
    Arena arena;
    x_.begin = arena.take<float>(kPoints * x_.point());
    dy_.begin = arena.take<float>(kPoints * dy_.point());
    const int64_t blocks_of_x = ceil_div(op_.inputs, kBlock);
    const int64_t blocks = ceil_div(op_.outputs, kBlock) * blocks_of_x;
    std::atomic<bool> finite{true};
    for (int64_t first = 0; first < tiles_ && finite; first += x_.steps) {
      const int64_t steps = minimum(x_.steps, tiles_ - first);
      parallel(steps, kPoints * (op_.inputs + op_.outputs), [&](int64_t begin, int64_t end) {
        for (int64_t step = begin; step < end; ++step) place(first + step, step);
      });
      parallel(blocks, kPoints * kBlock * kBlock * steps, [&](int64_t begin, int64_t end) {
        Arena inner;
        float* const sums = inner.take<float>(kPoints * kSums);
        for (int64_t i = begin; i < end; ++i)
          if (!compute(i / blocks_of_x * kBlock, i % blocks_of_x * kBlock, steps, first == 0, sums))
            finite = false;
      });
    }
    return finite;
  }

 private:
  // B^T d B of x, A d A^T of dy.
  void place(int64_t tile, int64_t step) const {
    const int64_t image = tile / tile_columns_ / tile_rows_;
    const int64_t row = tile / tile_columns_ % tile_rows_ * kTile, column = tile % tile_columns_ * kTile;
    const ConvAxis &rows = op_.rows, &columns = op_.columns;
    const T *x[kPoints], *dy[kTile * kTile];  // where the tile's values lie, null beyond the border
    for (int64_t i = 0; i < kSide; ++i)
      for (int64_t j = 0; j < kSide; ++j) {
        const int64_t at_row = rows.place(row, i), at_column = columns.place(column, j);
        const int64_t pixel = (image * rows.size + at_row) * columns.size + at_column;
        x[i * kSide + j] = rows.inside(at_row) && columns.inside(at_column)
                               ? static_cast<const T*>(op_.x) + pixel * op_.inputs
                               : nullptr;
      }
    for (int64_t i = 0; i < kTile; ++i)
      for (int64_t j = 0; j < kTile; ++j) {
        const int64_t pixel = (image * rows.outputs + row + i) * columns.outputs + column + j;
        dy[i * kTile + j] = row + i < rows.outputs && column + j < columns.outputs
                                ? static_cast<const T*>(op_.dy) + pixel * op_.outputs
                                : nullptr;
      }
    transform_all<kSide>(x_, step, x, [](const auto& d, auto& t) FUSEDRES_INLINE_LAMBDA { W::input(d, t); });
    transform_all<kTile>(dy_, step, dy,
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

  // What these steps add to a block of dweight. Whether all of it is finite.
  bool compute(int64_t output, int64_t input, int64_t steps, bool fresh, float* sums) const {
    const int64_t outputs = minimum(kBlock, op_.outputs - output);
    const int64_t inputs = minimum(kBlock, op_.inputs - input);
    for (int64_t point = 0; point < kPoints; ++point)
      for (int64_t i = 0; i < inputs; i += kSumColumns)
        for (int64_t o = 0; o < outputs; o += kSumRows) {
          float* const to = sums + point * kSums + o * kBlock + i;
          for (int64_t step = 0; step < steps; step += kTerms)
            multiply(
                dy_.from(point, output + o, step), x_.from(point, input + i, step),
                minimum(kTerms, steps - step), [](int64_t) {},
                [=](int row, int v, Vec<float> sum) FUSEDRES_INLINE_LAMBDA {
                  float* const at = to + row * kBlock + v * kLanes;
                  store(at, step == 0 ? sum : load(at, AllLanes{}) + sum);
                });
        }
    Vec<float> differences{};  // NaN where a value is not finite
    for (int64_t o = 0; o < outputs; ++o)
      for (int64_t i = 0; i < inputs; i += kLanes) {
        float* const to = op_.dweight + (output + o) * kTaps * kTaps * op_.inputs + input + i;
        const Vec<float> added = i + kLanes <= inputs ? add(sums + o * kBlock + i, to, fresh, AllLanes{})
                                                      : add(sums + o * kBlock + i, to, fresh,
                                                            FirstLanes{static_cast<int>(inputs - i)});
        differences = differences + added;
      }
    return !bits_above(differences, 0.0f);
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
  Panels<float> x_, dy_;
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

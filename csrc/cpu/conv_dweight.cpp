#include "conv_dweight.h"

namespace fusedres::FUSEDRES_ISA {
namespace {

constexpr int kLanes = Vec<float>::kLanes;
constexpr int64_t kRunSteps = 128;
constexpr int64_t kBlockRows = 128;  // outputs of a block of dweight
constexpr int64_t kMostGroups = 16;
constexpr int64_t kGroupBytes = int64_t{256} << 10;  // that a group's sums may take

// dweight[o][tap][i] = the sum over pixels p of dy[p][o] * x[what `tap` of p's window sees][i]
//
// A step is two neighbouring pixels of dy, and a point a tap. Where there are few inputs, the whole window is
// one point, and a tap is one of its rows. The sums of a run of steps stay in registers; the runs are either
// shared out in groups, whose sums are added up in the end, or gone through one by one, each by all threads.
class Direct {
 public:
  explicit Direct(const ConvDweight& op)
      : op_(op),
        x_(static_cast<const BFloat16*>(op.x)),
        dy_(static_cast<const BFloat16*>(op.dy)),
        flat_(op.inputs < kPanel),
        across_(flat_ ? op.columns.kernel : 1),
        taps_(op.rows.kernel * op.columns.kernel / across_),
        run_(across_ * op.inputs),
        stride_(taps_ * run_),
        size_(op.outputs * stride_),
        points_(flat_ ? 1 : taps_),
        channels_(stride_ / points_),
        pixels_(op.images * op.rows.outputs * op.columns.outputs),
        steps_(ceil_div(pixels_, 2)),
        runs_(ceil_div(steps_, kRunSteps)),
        groups_(size_ * int64_t{sizeof(float)} > kGroupBytes ? 1 : minimum(runs_, kMostGroups)),
        blocks_of_x_(ceil_div(channels_, kSumColumns)),
        blocks_(ceil_div(op.outputs, kBlockRows) * points_ * blocks_of_x_) {}

  void run() const {
    if (groups_ > 1)
      by_groups();
    else
      by_blocks();
  }

 private:
  // Of a run.
  struct Operands {
    Panels<BFloat16> x, dy;
    BFloat16* zeros;

    Operands(const Direct& of, Arena& arena)
        : x{of.channels_, kRunSteps, of.flat_, nullptr}, dy{of.op_.outputs, kRunSteps, false, nullptr} {
      x.begin = arena.take<BFloat16>(of.points_ * x.point());
      dy.begin = arena.take<BFloat16>(dy.point());
      const int64_t most = maximum(of.run_, of.op_.outputs);
      zeros = arena.take<BFloat16>(most);
      for (int64_t i = 0; i < most; ++i) zeros[i] = {};
    }
  };

  int64_t steps_of(int64_t run) const { return minimum(kRunSteps, steps_ - run * kRunSteps); }

  void by_groups() const {
    Arena arena;
    float* const others = arena.take<float>((groups_ - 1) * size_);
    parallel(groups_, size_ * kRunSteps, [&](int64_t begin, int64_t end) {
      Arena inner;
      const Operands operands(*this, inner);
      for (int64_t group = begin; group < end; ++group) {
        float* const sums = group ? others + (group - 1) * size_ : op_.dweight;
        const int64_t first = group * runs_ / groups_, last = (group + 1) * runs_ / groups_;
        for (int64_t run = first; run < last; ++run) {
          place(operands, run, 0, steps_of(run));
          for (int64_t block = 0; block < blocks_; ++block)
            compute(operands, block, steps_of(run), run == first, sums);
        }
      }
    });
    parallel(ceil_div(size_, kLanes), groups_ * kLanes, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * kLanes; i < minimum(end * kLanes, size_); i += kLanes)
        if (i + kLanes <= size_)
          add(others + i, op_.dweight + i, AllLanes{});
        else
          add(others + i, op_.dweight + i, FirstLanes{static_cast<int>(size_ - i)});
    });
  }

  template <class Lanes>
  FUSEDRES_INLINE void add(const float* others, float* to, Lanes lanes) const {
    Vec<float> sum = load(to, lanes);
    for (int64_t group = 1; group < groups_; ++group, others += size_) sum = sum + load(others, lanes);
    store(to, sum, lanes);
  }

  void by_blocks() const {
    Arena arena;
    const Operands operands(*this, arena);
    for (int64_t run = 0; run < runs_; ++run) {
      parallel(steps_of(run), stride_ + op_.outputs,
               [&](int64_t begin, int64_t end) { place(operands, run, begin, end); });
      parallel(blocks_, kBlockRows * kSumColumns * kRunSteps, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block)
          compute(operands, block, steps_of(run), run == 0, op_.dweight);
      });
    }
  }

  struct Pixel {
    int64_t image, row, column;
  };
  Pixel pixel_at(int64_t pixel) const {
    const int64_t row = pixel / op_.columns.outputs;
    return {row / op_.rows.outputs, row % op_.rows.outputs, pixel % op_.columns.outputs};
  }

  // Steps [begin, end) of a run. The last one of all may have one pixel.
  void place(const Operands& to, int64_t run, int64_t begin, int64_t end) const {
    Arena arena;
    BFloat16* const copies = flat_ ? arena.take<BFloat16>(2 * run_) : nullptr;
    for (int64_t step = begin; step < end; ++step) {
      const int64_t pixel = 2 * (run * kRunSteps + step);
      const BFloat16* const dy = dy_ + pixel * op_.outputs;
      place_pair(dy, pixel + 1 < pixels_ ? dy + op_.outputs : to.zeros, op_.outputs, to.dy, 0, 0, step);
      const Pixel first = pixel_at(pixel), second = pixel_at(pixel + 1);
      for (int64_t tap = 0; tap < taps_; ++tap) {
        const int64_t i = flat_ ? tap : tap / op_.columns.kernel, j = flat_ ? 0 : tap % op_.columns.kernel;
        const BFloat16* const from = run_at(first, i, j, to.zeros, copies);
        place_pair(from, run_at(second, i, j, to.zeros, copies + run_), run_, to.x, flat_ ? 0 : tap,
                   flat_ ? tap * run_ : 0, step);
      }
    }
  }

  // A tap of a pixel's window: where it lies in x, zeros, or a copy with zeros beyond the border.
  const BFloat16* run_at(const Pixel& pixel, int64_t i, int64_t j, const BFloat16* zeros,
                         BFloat16* copy) const {
    const ConvAxis &rows = op_.rows, &columns = op_.columns;
    const int64_t row = rows.place(pixel.row, i), column = columns.place(pixel.column, j);
    if (pixel.image == op_.images || !rows.inside(row)) return zeros;
    const BFloat16* const x_row = x_ + (pixel.image * rows.size + row) * columns.size * op_.inputs;
    const bool begins = columns.inside(column),
               ends = columns.inside(column + (across_ - 1) * columns.dilation);
    if (begins && ends && (across_ == 1 || columns.dilation == 1)) return x_row + column * op_.inputs;
    if (across_ == 1) return zeros;
    for (int64_t k = 0; k < run_; ++k) {
      const int64_t from = column + k / op_.inputs * columns.dilation;
      copy[k] = columns.inside(from) ? x_row[from * op_.inputs + k % op_.inputs] : BFloat16{};
    }
    return copy;
  }

  // Each channel's values of two pixels side by side. What fills the last panel is multiplied, but not
  // stored.
  static void place_pair(const BFloat16* first, const BFloat16* second, int64_t count,
                         const Panels<BFloat16>& to, int64_t point, int64_t channel, int64_t step) {
    auto place = [&](int64_t i, auto lanes) FUSEDRES_INLINE_LAMBDA {
      const Words low = bit_cast<Words>(load(first + i, lanes).v) >> 16;
      const Words pairs = low | bit_cast<Words>(load(second + i, lanes).v);
      store(reinterpret_cast<float*>(to.at(point, channel + i, step)),
            Vec<float>{bit_cast<Vec<float>::Native>(pairs)}, lanes);
    };
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) place(i, AllLanes{});
    if (i < count) place(i, FirstLanes{static_cast<int>(count - i)});
  }

  // What a run adds to a block of dweight.
  void compute(const Operands& from, int64_t block, int64_t steps, bool fresh, float* dweight) const {
    const int64_t of_x = block % (points_ * blocks_of_x_), point = of_x / blocks_of_x_;
    const int64_t input = of_x % blocks_of_x_ * kSumColumns, columns = channels_ - input;
    const int64_t first = block / (points_ * blocks_of_x_) * kBlockRows;
    const int64_t last = minimum(first + kBlockRows, op_.outputs);
    for (int64_t output = first; output < last; output += kSumRows) {
      float* const sums = dweight + output * stride_ + point * op_.inputs + input;
      const int64_t rows = last - output;
      for (int64_t row = 0; row < minimum<int64_t>(rows, kSumRows); ++row)
        for (int64_t c = 0; c < minimum(columns, kSumColumns); c += kGap)
          __builtin_prefetch(sums + row * stride_ + c, 1);
      multiply(from.dy.from(0, output, 0), from.x.from(point, input, 0), steps,
               [=](int row, int v, Vec<float> sum) FUSEDRES_INLINE_LAMBDA {
                 float* const to = sums + row * stride_ + v * kLanes;
                 const int64_t lanes = columns - v * kLanes;
                 if (row >= rows || lanes <= 0) return;
                 auto finish = [=](auto those) FUSEDRES_INLINE_LAMBDA {
                   store(to, fresh ? sum : load(to, those) + sum, those);
                 };
                 if (lanes >= kLanes)
                   finish(AllLanes{});
                 else
                   finish(FirstLanes{static_cast<int>(lanes)});
               });
    }
  }

  const ConvDweight& op_;
  const BFloat16* const x_;
  const BFloat16* const dy_;
  const bool flat_;
  const int64_t across_;             // columns of a tap
  const int64_t taps_, run_;         // run_: values of a tap
  const int64_t stride_, size_;      // of dweight, and of its rows
  const int64_t points_, channels_;  // channels_: of a point
  const int64_t pixels_, steps_, runs_, groups_;
  const int64_t blocks_of_x_, blocks_;
};

}  // namespace

bool conv_dweight(const ConvDweight& op) {
  if (op.images * op.rows.outputs * op.columns.outputs == 0) {
    const int64_t size = op.outputs * op.rows.kernel * op.columns.kernel * op.inputs;
    __builtin_memset(op.dweight, 0, size * sizeof(float));
    return true;
  }
  if (op.tile > 1) return conv_dweight_winograd(op);
  Direct(op).run();
  return true;
}

}  // namespace fusedres::FUSEDRES_ISA

// conv_dweight by the tile unit: 32 outputs times 32 values of a window's point in four tiles of sums.
//
// Two tiles of dy and two of x are loaded for four products. Meanwhile the vector unit adds the sums of the
// run before to dweight, and places the next slice of x.
#include "conv_dweight_groups.h"
#include "conv_dweight_slices.h"
#include "isa.h"

namespace fusedres::FUSEDRES_ISA {
namespace {

constexpr int64_t kLanes = Vec<float>::kLanes;
constexpr int64_t kMostSteps = 10;                   // of a run: its sums stay in registers
constexpr int64_t kMostOutputs = 512;                // whose slices are there together
constexpr int64_t kSlab = 4 * kSlice;                // values of a point that are placed together
constexpr int64_t kStretchBytes = int64_t{1} << 20;  // of what is placed, in the second-level cache

struct alignas(64) Sums {
  float rows[kSlice][kSlice];
};

// A block of dweight.
struct Block {
  float* begin;
  int64_t stride, rows, columns;
  bool fresh;  // or there are sums already
};

// The rows of a block whose sums are still to be added to it.
class Pending {
 public:
  Pending() = default;
  Pending(const Sums& sums, const Block& to) : sums_(&sums), to_(to) {}

  int64_t left() const { return to_.rows - row_; }

  FUSEDRES_INLINE void add(int64_t rows) {
    for (const int64_t end = minimum(row_ + rows, to_.rows); row_ < end; ++row_) {
      int64_t column = 0;
      for (; column + kLanes <= to_.columns; column += kLanes) add(column, AllLanes{});
      if (column < to_.columns) add(column, FirstLanes{static_cast<int>(to_.columns - column)});
    }
  }

 private:
  template <class Lanes>
  FUSEDRES_INLINE void add(int64_t column, Lanes lanes) const {
    const Vec<float> sum = load(&sums_->rows[row_][column], AllLanes{});
    float* const at = to_.begin + row_ * to_.stride + column;
    store(at, to_.fresh ? sum : load(at, lanes) + sum, lanes);
  }

  const Sums* sums_ = nullptr;
  Block to_{};
  int64_t row_ = 0;
};

// How the work is cut. The sums are the same bits for any number of threads.
//
// The pixels come in steps, these in runs, and these in groups, each of which has its own dweight; in the end
// these are added up. A unit is what a group adds to the weights between a range of outputs and a slab of x.
struct Plan {
  explicit Plan(const ConvDweight& op)
      : points(op),
        window(points.count * points.values),
        size(op.outputs * window),
        pixels(op.images * op.rows.outputs * op.columns.outputs),
        runs(ceil_div(ceil_div(pixels, kStepPixels), kMostSteps)),
        length(ceil_div(ceil_div(pixels, kStepPixels), runs)),
        groups(Groups::count_for(runs, size)),
        range(whole_slices(ceil_div(op.outputs, ceil_div(op.outputs, kMostOutputs)))),
        slab(minimum(kSlab, whole_slices(points.values))) {
    // So small that there is a unit for each thread.
    auto cut = [&](int64_t& channels) {
      for (;; channels -= kSlice) {
        ranges = ceil_div(op.outputs, range);
        slabs = ceil_div(points.values, slab) * points.count;
        if (units() >= op.threads || channels == kSlice) return;
      }
    };
    cut(slab);
    cut(range);
    const int64_t step = (range + 2 * slab) / kSlice * kStepValues * int64_t{sizeof(BFloat16)} +
                         kStepPixels * Pixels::bytes(op);
    stretch = minimum(ceil_div(runs, groups), maximum<int64_t>(1, kStretchBytes / (length * step)));
  }

  static int64_t whole_slices(int64_t channels) { return ceil_div(channels, kSlice) * kSlice; }
  int64_t units() const { return groups * ranges * slabs; }

  const Points points;
  const int64_t window;  // values: from an output of dweight to the next one
  const int64_t size;    // of dweight
  const int64_t pixels;
  const int64_t runs, length;  // steps of a run
  const int64_t groups;
  int64_t range, slab;  // channels
  int64_t ranges, slabs;
  int64_t stretch;  // runs that are placed together
};

// One thread's.
class Work {
 public:
  Work(const ConvDweight& op, const Plan& plan)
      : op_(op),
        plan_(plan),
        pixels_(op, plan.stretch * plan.length * kStepPixels, arena_),
        pitch_(plan.stretch * plan.length * kStepValues),
        dy_(arena_.take<BFloat16>(plan.range / kSlice * pitch_)),
        x_{arena_.take<BFloat16>(plan.slab / kSlice * pitch_),
           arena_.take<BFloat16>(plan.slab / kSlice * pitch_)} {}

  // Slabs [first, last) of a group and range, into the group's dweight.
  void compute(int64_t group, int64_t range, int64_t first, int64_t last, float* dweight) {
    const int64_t begin = group * plan_.runs / plan_.groups, end = (group + 1) * plan_.runs / plan_.groups;
    output_ = range * plan_.range;
    outputs_ = minimum(plan_.range, op_.outputs - output_);
    for (int64_t run = begin; run < end; run += plan_.stretch) {
      place(run, minimum(run + plan_.stretch, end));
      Placing next = placing(first);
      next.place(next.left());
      for (int64_t slab = first; slab < last; ++slab) {
        next = slab + 1 < last ? placing(slab + 1) : Placing{};
        multiply_slab(slab, run == begin, dweight, next);
      }
    }
    before_.add(before_.left());
  }

 private:
  // Where the pixels of runs [first, last) lie, and dy's slices.
  __attribute__((noinline)) void place(int64_t first, int64_t last) {
    const int64_t begin = first * plan_.length * kStepPixels;
    const int64_t end = minimum(last * plan_.length * kStepPixels, plan_.pixels);
    pixels_.place(begin, end - begin);
    steps_ = ceil_div(end - begin, kStepPixels);
    Placing dy(pixels_.of_dy(), output_, outputs_, steps_, dy_, pitch_);
    for (int64_t step = 0; step < steps_; ++step) {
      dy.place(kStepPairs);
      for (int64_t output = 0; output < outputs_; output += kPanel)
        turn(dy_ + output / kSlice * pitch_ + step * kStepValues + output % kSlice * 2);
    }
  }

  // Slabs are gone through point by point: their windows share what they read.
  int64_t point(int64_t slab) const { return slab % plan_.points.count; }
  int64_t value(int64_t slab) const { return slab / plan_.points.count * plan_.slab; }
  int64_t values(int64_t slab) const { return minimum(plan_.slab, plan_.points.values - value(slab)); }

  Placing placing(int64_t slab) const {
    return {pixels_.of_x(point(slab)), value(slab), values(slab), steps_, x_[slab % 2], pitch_};
  }

  // Of a run the sums of all blocks, so that a slice of x stays in the first-level cache.
  void multiply_slab(int64_t slab, bool fresh, float* dweight, Placing& next) {
    const int64_t slices = ceil_div(values(slab), kSlice);
    const int64_t each = ceil_div(next.left(), slices * ceil_div(outputs_, kSlice) * steps_);
    float* const to = dweight + output_ * plan_.window + point(slab) * plan_.points.values + value(slab);
    for (int64_t step = 0; step < steps_; step += plan_.length, fresh = false)
      for (int64_t slice = 0; slice < slices; ++slice)
        for (int64_t output = 0; output < outputs_; output += kSlice) {
          const BFloat16* const dy = dy_ + output / kSlice * pitch_ + step * kStepValues;
          const BFloat16* const x = x_[slab % 2] + slice * pitch_ + step * kStepValues;
          const Block block{to + output * plan_.window + slice * kSlice, plan_.window,
                            minimum(kSlice, outputs_ - output),
                            minimum(kSlice, values(slab) - slice * kSlice), fresh};
          multiply(dy, x, minimum(plan_.length, steps_ - step), block, next, each);
        }
  }

  void multiply(const BFloat16* dy, const BFloat16* x, int64_t steps, const Block& to, Placing& next,
                int64_t each) {
    if (to.rows > kPanel)
      to.columns > kPanel ? multiply<2, 2>(dy, x, steps, next, each)
                          : multiply<2, 1>(dy, x, steps, next, each);
    else
      to.columns > kPanel ? multiply<1, 2>(dy, x, steps, next, each)
                          : multiply<1, 1>(dy, x, steps, next, each);
    before_ = Pending(sums_, to);
  }

  // A call: inlined, the loops around it would take the registers that its pointers need.
  template <int kRowTiles, int kColumnTiles>
  __attribute__((noinline)) void multiply(const BFloat16* dy, const BFloat16* x, int64_t steps, Placing& next,
                                          int64_t pairs) {
    using Tiles = TileSums<kRowTiles, kColumnTiles>;
    Pending before = before_;
    Placing placing = next;
    const int64_t rows = ceil_div(before.left(), steps);
    Tiles::zero();
    for (int64_t step = 0; step < steps; ++step, dy += kStepValues, x += kStepValues) {
      Tiles::add(dy, kPairBytes, dy + kPairValues / 2, kPairBytes, x, kPairBytes);
      before.add(rows);
      placing.place(pairs);
    }
    Tiles::store(&sums_.rows[0][0], int64_t{sizeof sums_.rows[0]});
    next = placing;
  }

  const ConvDweight& op_;
  const Plan& plan_;
  Arena arena_;
  Pixels pixels_;
  const int64_t pitch_;  // from a slice of dy to the next one
  BFloat16* const dy_;
  BFloat16* const x_[2];
  int64_t output_ = 0, outputs_ = 0;  // of the range
  int64_t steps_ = 0;                 // that are placed
  Sums sums_;
  Pending before_;  // whose sums are there
};

void conv_dweight_direct(const ConvDweight& op) {
  const Plan plan(op);
  Arena arena;
  const Groups groups(plan.groups, plan.size, op.dweight, arena);
  const int64_t each = plan.pixels / plan.groups * kSlice;
  parallel(plan.units(), each, [&](int64_t begin, int64_t end) {
    Work work(op, plan);
    tile_configure();
    for (int64_t unit = begin; unit < end;) {
      const int64_t outer = unit / plan.slabs, group = outer / plan.ranges, first = unit % plan.slabs;
      const int64_t last = minimum(plan.slabs, first + end - unit);
      work.compute(group, outer % plan.ranges, first, last, groups.at(group));
      unit += last - first;
    }
    tile_release();
  });
  groups.add_up();
}

}  // namespace

bool conv_dweight(const ConvDweight& op) {
  if (op.tile > 1 || op.images * op.rows.outputs * op.columns.outputs == 0)
    return FUSEDRES_BESIDE_TILES::conv_dweight(op);
  conv_dweight_direct(op);
  return true;
}

}  // namespace fusedres::FUSEDRES_ISA

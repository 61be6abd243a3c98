#include "conv_dweight_groups.h"
#include "conv_dweight_placing.h"
#include "pieces.h"

namespace fusedres::FUSEDRES_ISA {
namespace {

constexpr int kLanes = Vec<float>::kLanes;
// Steps of a run: longer sums lose more digits, most where products are rounded too.
#if defined(__FMA__)
constexpr int64_t kMostFloats = 64;
#else
constexpr int64_t kMostFloats = 32;
#endif
template <class T>
constexpr int64_t kMostSteps = sizeof(Value<T>) == sizeof(float) ? kMostFloats : 160;
constexpr int64_t kBlockRows = 128;  // outputs of a block of dweight

// dweight[o][tap][i] = the sum over pixels p of dy[p][o] * x[what p's window sees at the tap][i]
//
// The steps come in runs: a block's sums over a run stay in registers. The runs come in groups, each of which
// has its own dweight, and these are added up in the end. Where there are fewer groups than threads, these
// share each run's steps and then its blocks; the result is the same bits.
template <class T>
class Direct {
 public:
  explicit Direct(const ConvDweight& op)
      : op_(op),
        placing_(op),
        stride_(placing_.window()),
        size_(op.outputs * stride_),
        steps_(placing_.steps()),
        runs_(ceil_div(steps_, kMostSteps<T>)),
        length_(ceil_div(steps_, runs_)),
        groups_(Groups::count_for(runs_, size_)),
        blocks_of_channels_(ceil_div(placing_.channels(), kSumColumns)),
        blocks_of_x_(placing_.points() * blocks_of_channels_),
        blocks_(ceil_div(op.outputs, kBlockRows) * blocks_of_x_) {}

  void run() const {
    Arena arena;
    const Groups groups(groups_, size_, op_.dweight, arena);
    auto sum_up = [&](int64_t group) {
      add_runs(group * runs_ / groups_, (group + 1) * runs_ / groups_, groups.at(group));
    };
    if (groups_ < op_.threads)
      for (int64_t group = 0; group < groups_; ++group) sum_up(group);
    else
      for_each_piece(groups_, size_ * length_, sum_up);
    groups.add_up();
  }

 private:
  int64_t steps_of(int64_t run) const { return minimum(length_, steps_ - run * length_); }

  void add_runs(int64_t first, int64_t last, float* sums) const {
    Arena arena;
    const typename Placing<T>::Operands operands = placing_.operands(length_, arena);
    for (int64_t run = first; run < last; ++run) {
      parallel(steps_of(run), stride_ + op_.outputs,
               [&](int64_t begin, int64_t end) { placing_.place(operands, run * length_, begin, end); });
      const int64_t slices = blocks_of_x_ * ceil_div(op_.outputs, kSumRows);
      const Ahead<T> ahead = placing_.ahead((run + 1) * length_, length_, slices);
      for_each_piece(blocks_, kBlockRows * kSumColumns * length_,
                     [&](int64_t block) { compute(operands, run, block, ahead, run == first, sums); });
    }
  }

  // What a run adds to a block of dweight, while the next one comes into the cache.
  void compute(const typename Placing<T>::Operands& from, int64_t run, int64_t block, const Ahead<T>& ahead,
               bool fresh, float* dweight) const {
    const int64_t of_x = block % blocks_of_x_, first = block / blocks_of_x_ * kBlockRows;
    const int64_t point = of_x / blocks_of_channels_, input = of_x % blocks_of_channels_ * kSumColumns;
    const int64_t last = minimum(first + kBlockRows, op_.outputs);
    int64_t slice = (first * blocks_of_x_ + (last - first) * of_x) / kSumRows;
    for (int64_t output = first; output < last; output += kSumRows, ++slice)
      add_product(from.dy.from(0, output, 0), from.x.from(point, input, 0), steps_of(run), ahead, slice,
                  fresh,
                  {dweight + output * stride_ + point * placing_.channels() + input, last - output,
                   placing_.channels() - input});
  }

  // Of dweight, from some place on.
  struct Sums {
    float* begin;
    int64_t rows, columns;
  };

  FUSEDRES_INLINE void add_product(const Steps<Value<T>>& dy, const Steps<Value<T>>& x, int64_t steps,
                                   const Ahead<T>& ahead, int64_t slice, bool fresh, const Sums& to) const {
    for (int64_t row = 0; row < minimum<int64_t>(to.rows, kSumRows); ++row)
      for (int64_t column = 0; column < minimum(to.columns, kSumColumns); column += kPanel)
        __builtin_prefetch(to.begin + row * stride_ + column, 1);
    const T* const next = ahead.at(slice);
    const int64_t pace = ceil_div(ahead.slice, length_);
    multiply(
        dy, x, steps,
        [=](int64_t step) FUSEDRES_INLINE_LAMBDA { __builtin_prefetch(next + step * pace, 0, 2); },
        [=](int row, int v, Vec<float> sum) FUSEDRES_INLINE_LAMBDA {
          const int64_t lanes = to.columns - v * kLanes;
          if (row >= to.rows || lanes <= 0) return;
          float* const at = to.begin + row * stride_ + v * kLanes;
          auto finish = [=](auto those)
                            FUSEDRES_INLINE_LAMBDA { store(at, fresh ? sum : load(at, those) + sum, those); };
          if (lanes >= kLanes)
            finish(AllLanes{});
          else
            finish(FirstLanes{static_cast<int>(lanes)});
        });
  }

  const ConvDweight& op_;
  const Placing<T> placing_;
  const int64_t stride_, size_;  // of dweight: from an output to the next one, and of all
  const int64_t steps_, runs_;
  const int64_t length_;  // steps of a run
  const int64_t groups_;
  const int64_t blocks_of_channels_, blocks_of_x_, blocks_;
};

}  // namespace

bool conv_dweight(const ConvDweight& op) {
  if (op.images * op.rows.outputs * op.columns.outputs == 0) {
    const int64_t size = op.outputs * op.rows.kernel * op.columns.kernel * op.inputs;
    __builtin_memset(op.dweight, 0, size * sizeof(float));
    return true;
  }
  if (op.tile > 1) return conv_dweight_winograd(op);
#if !defined(__AVX512BF16__)
  if (op.dtype == DType::kFloat32) {
    Direct<float>(op).run();
    return true;
  }
#endif
  Direct<BFloat16>(op).run();
  return true;
}

}  // namespace fusedres::FUSEDRES_ISA

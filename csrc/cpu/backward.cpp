#include "backward.h"

namespace fusedres::FUSEDRES_ISA {
namespace {

constexpr int64_t kTile = 64;  // channels that are finished together

// Tensors from this size on lie in memory or a cache far away: computing z again costs less than reading y.
constexpr int64_t kFarBytes = int64_t{4} << 20;

// One operand's sums over all parts, for a tile of channels.
struct Sums {
  double g[kTile];
  double g_t[kTile];  // of g * (t - mean's high part)
};

template <class A>
struct OperandTables {
  A* b = nullptr;
  A* d = nullptr;
};

// dweight and dbias, and what the second pass needs for batch statistics, of channels [first, first + count).
template <class A>
void finish_operand(const OperandBackward<A>& operand, const Sums& sums, int64_t values, int64_t first,
                    int64_t count, void* dweight, void* dbias, const OperandTables<A>& tables) {
  const Constants<A>& constants = operand.constants;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t c = first + i;
    const double low = constants.low(c), rstd = constants.rstd ? constants.rstd[c] : A{1};
    const double weight_gradient = (sums.g_t[i] - low * sums.g[i]) * rstd;
    if (dweight) static_cast<A*>(dweight)[c] = static_cast<A>(weight_gradient);
    if (dbias) static_cast<A*>(dbias)[c] = static_cast<A>(sums.g[i]);
    if (!tables.b) continue;
    const double a = constants.scale(c), b = -a * rstd * weight_gradient / static_cast<double>(values);
    tables.b[c] = static_cast<A>(b);
    tables.d[c] = static_cast<A>(-a * sums.g[i] / static_cast<double>(values) - b * low);
  }
}

// The gate's gradient from a value per (image or all, channel).
template <class A>
void sum_to_gate(const double* full, const Gate& gate, const Shape& shape, void* dgate) {
  const int64_t rows = per_image(gate) ? shape.images : 1;
  A* const to = static_cast<A*>(dgate);
  for (int64_t row = 0; row < rows; ++row) {
    double sum = 0;
    for (int64_t c = 0; c < shape.channels; ++c) {
      sum += full[row * shape.channels + c];
      if (gate.channel_stride) {
        to[row * shape.channels + c] = static_cast<A>(sum);
        sum = 0;
      }
    }
    if (!gate.channel_stride) to[row] = static_cast<A>(sum);
  }
}

template <class A>
class Run {
 public:
  explicit Run(const Backward<A>& op)
      : op_(op),
        wide_(op.choice ? WideShape{op.shape, 1} : widen_rows(op.shape, op.gate, op.mask)),
        parts_(cut(wide_.shape, per_image(op.gate))) {}

  void operator()() {
    const Gradients& wanted = op_.gradients;
    const bool x_from_batch = wanted.dx && op_.x.from_batch, r_from_batch = wanted.dr && op_.r.from_batch;
    needs_x_ = wanted.dweight || wanted.dgate || x_from_batch;
    needs_r_ = wanted.dweight_r || r_from_batch;
    slope_ = {op_.act,
              op_.dy,
              finds_slope_from_x(x_from_batch) ? nullptr : op_.y,
              op_.mask,
              op_.x.data,
              op_.r.data,
              fold(op_.x.constants, op_.gate, wide_, arena_),
              {},
              per_image(op_.gate) ? wide_.shape.channels : 0,
              op_.choice,
              op_.pool};
    if (op_.r.constants.present()) slope_.r_affine = fold(op_.r.constants, Gate{}, wide_, arena_);
    if (x_from_batch) x_tables_ = take_tables();
    if (r_from_batch) r_tables_ = take_tables();
    if (needs_x_ || needs_r_ || wanted.dbias || wanted.dbias_r) sum();
    if (wanted.dx || wanted.dr) write();
  }

 private:
  // Whether ReLU's slope is had from x, which every pass reads anyway: a tensor less than with y.
  bool finds_slope_from_x(bool x_from_batch) const {
    const bool z_is_of_x = op_.act == Act::kRelu && op_.x.constants.present() && !op_.r.data && !op_.choice;
    const bool reads_x = needs_x_ && (x_from_batch || !op_.gradients.dx);
    return z_is_of_x && reads_x && op_.shape.elements() * size_of(op_.dtype) >= kFarBytes;
  }

  OperandTables<A> take_tables() {
    const int64_t channels = wide_.shape.channels;
    return {arena_.take<A>(channels), arena_.take<A>(channels)};
  }

  void repeat_tables(const OperandTables<A>& tables) {
    if (!tables.b) return;
    repeat(tables.b, 1, wide_);
    repeat(tables.d, 1, wide_);
  }

  void sum() {
    const int64_t size = parts_.count * wide_.shape.channels;
    g_ = arena_.take<double>(size);
    g_x_ = needs_x_ ? arena_.take<double>(size) : nullptr;
    g_r_ = needs_r_ ? arena_.take<double>(size) : nullptr;
    const int64_t gate_rows = per_image(op_.gate) ? op_.shape.images : 1;
    if (op_.gradients.dgate) dgate_ = arena_.take<double>(gate_rows * op_.shape.channels);
    const GradientSums pass{wide_.shape, op_.dtype, slope_, parts_, g_, g_x_, g_r_};
    op_.choice ? pool_gradient_sums(pass) : gradient_sums(pass);

    const int64_t channels = op_.shape.channels;
    parallel(ceil_div(channels, kTile), 4 * parts_.count * wide_.repeats * kTile,
             [&](int64_t begin, int64_t end) {
               for (int64_t first = begin * kTile; first < minimum(end * kTile, channels); first += kTile)
                 finish(first, minimum(kTile, channels - first));
             });
    repeat_tables(x_tables_);
    repeat_tables(r_tables_);
    if (dgate_) sum_to_gate<A>(dgate_, op_.gate, op_.shape, op_.gradients.dgate);
  }

  // Adds the parts up for channels [first, first + count), in the order of memory. Each period of a wide part
  // is a part of its own.
  void finish(int64_t first, int64_t count) {
    const int64_t channels = op_.shape.channels, values = op_.shape.rows();
    const int64_t pieces = parts_.pieces * wide_.repeats;
    Sums x{}, r{};
    double k[kTile], image_g[kTile] = {}, image_g_x[kTile] = {};
    for (int64_t part = 0; part < parts_.count * wide_.repeats; ++part) {
      const int64_t image = per_image(op_.gate) ? part / pieces : 0, at = part * channels + first;
      if (part % pieces == 0)
        for (int64_t i = 0; i < count; ++i) k[i] = gate_value(op_.gate, image, first + i);
      for (int64_t i = 0; i < count; ++i) {
        r.g[i] += g_[at + i];
        x.g[i] += k[i] * g_[at + i];
      }
      if (g_x_)
        for (int64_t i = 0; i < count; ++i) x.g_t[i] += k[i] * g_x_[at + i];
      if (g_r_)
        for (int64_t i = 0; i < count; ++i) r.g_t[i] += g_r_[at + i];
      if (!dgate_) continue;
      for (int64_t i = 0; i < count; ++i) {
        image_g[i] += g_[at + i];
        image_g_x[i] += g_x_[at + i];
      }
      if (part % pieces == pieces - 1) finish_gate(image, first, count, image_g, image_g_x);
    }
    const Gradients& to = op_.gradients;
    finish_operand(op_.x, x, values, first, count, to.dweight, to.dbias, x_tables_);
    finish_operand(op_.r, r, values, first, count, to.dweight_r, to.dbias_r, r_tables_);
  }

  void finish_gate(int64_t image, int64_t first, int64_t count, double* g, double* g_x) {
    const Constants<A>& constants = op_.x.constants;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t c = first + i;
      const double bias = constants.bias ? constants.bias[c] : A{0};
      dgate_[image * op_.shape.channels + c] =
          constants.scale(c) * (g_x[i] - constants.low(c) * g[i]) + bias * g[i];
      g[i] = g_x[i] = 0;
    }
  }

  void write() {
    const Gradients& to = op_.gradients;
    // A is the forward's scale, the gate folded in.
    const void* const a = op_.x.constants.present() || op_.gate.data ? slope_.x_affine.scale : nullptr;
    const GradientApply pass{wide_.shape,
                             op_.dtype,
                             slope_,
                             {to.dx, a, x_tables_.b, x_tables_.d},
                             {to.dr, slope_.r_affine.scale, r_tables_.b, r_tables_.d}};
    op_.choice ? pool_gradient_apply(pass) : gradient_apply(pass);
  }

  const Backward<A>& op_;
  const WideShape wide_;
  const Parts parts_;
  Arena arena_;
  Slope slope_{};
  bool needs_x_ = false, needs_r_ = false;
  OperandTables<A> x_tables_, r_tables_;
  double* g_ = nullptr;
  double* g_x_ = nullptr;
  double* g_r_ = nullptr;
  double* dgate_ = nullptr;
};

}  // namespace

template <class A>
void backward(const Backward<A>& op) {
  Run<A>{op}();
}

#if !defined(__AVX2__)
template void backward(const Backward<double>& op);
#endif
template void backward(const Backward<float>& op);

}  // namespace fusedres::FUSEDRES_ISA

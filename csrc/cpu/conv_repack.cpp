#include "conv_product.h"
#include "conv_weights.h"
#include "walk.h"
#include "winograd.h"

namespace fusedres::FUSEDRES_ISA {
namespace {

constexpr int kLanes = Vec<float>::kLanes;
constexpr int64_t kWidth = ConvWeights::kWidth;
constexpr int64_t kInputs = 16;  // that are packed together
// From one point's values to the next one's: they shall not fall on each other in the cache.
constexpr int64_t kPoint = kInputs * kWidth + 16;
// So many bytes will have left the caches when they are read.
constexpr int64_t kStreamedBytes = int64_t{16} << 20;

ConvWeights shape_of(const ConvRepack& op) {
  return {op.dtype, 1, op.inputs, op.outputs, op.rows, op.columns, op.tile};
}

// Where a value of every output of a block lies.
template <class T>
struct Lanes {
  const T* begin;
  int64_t stride;
  int64_t count;

  T at(int64_t lane) const { return begin[lane * stride]; }
};

// One step of a run, `width` lanes of its inputs: float32 has one, bfloat16 two, of which the last may be
// missing.
void write_step(float* to, const Lanes<float>& first, const Lanes<float>*, int64_t width) {
  for (int64_t lane = 0; lane < first.count; ++lane) to[lane] = first.at(lane);
  for (int64_t lane = first.count; lane < width; ++lane) to[lane] = 0;
}
void write_step(BFloat16* to, const Lanes<BFloat16>& first, const Lanes<BFloat16>* second, int64_t width) {
  uint32_t words[kWidth] = {};
  if (second && second->begin == first.begin + 1) {
    for (int64_t lane = 0; lane < first.count; ++lane)
      words[lane] = pair_at(first.begin + lane * first.stride);
  } else if (second) {
    for (int64_t lane = 0; lane < first.count; ++lane)
      words[lane] = first.at(lane).bits | uint32_t{second->at(lane).bits} << 16;
  } else {
    for (int64_t lane = 0; lane < first.count; ++lane) words[lane] = first.at(lane).bits;
  }
  __builtin_memcpy(to, words, width * sizeof *words);
}

template <class T>
class Repack {
 public:
  explicit Repack(const ConvRepack& op)
      : op_(op),
        shape_(shape_of(op)),
        packed_(static_cast<T*>(op.packed)),
        points_(reinterpret_cast<float*>(packed_ + shape_.direct(1, 0))),
        values_(arena_.take<float>(op.rows * op.columns * kInputs * kWidth)),
        transformed_(arena_.take<float>(shape_.side() * shape_.side() * kPoint)) {}

  // `count` inputs of a block.
  void pack(int64_t block, int64_t first, int64_t count) {
    block_ = block;
    width_ = shape_.width(block);
    direct(first, count);
    if (op_.tile == 1) return;
    gather(first, count);
    if (op_.tile == 2) transform<2>(first, count);
    if (op_.tile == 4) transform<4>(first, count);
    if (op_.tile == 7) transform<7>(first, count);
  }

 private:
  Lanes<T> lanes(int64_t place, int64_t input) const {
    const int64_t begin = block_ * kWidth, row = place / op_.columns, column = place % op_.columns;
    const T* const from = static_cast<const T*>(op_.weight) + begin * op_.strides[0] +
                          input * op_.strides[1] + row * op_.strides[2] + column * op_.strides[3];
    return {from, op_.strides[0], minimum(width_, op_.outputs - begin)};
  }

  // The steps of every tap that these inputs are in; where a tap is a row of the window, they are all there.
  void direct(int64_t first, int64_t count) const {
    const bool flat = shape_.flat();
    const int64_t begin = flat ? 0 : first, end = flat ? shape_.run() : first + count;
    for (int64_t tap = 0; tap < shape_.taps(); ++tap) {
      auto value = [&](int64_t k) {
        return flat ? lanes(tap * op_.columns + k / op_.inputs, k % op_.inputs) : lanes(tap, k);
      };
      T* to = packed_ + shape_.direct(0, block_) + (tap * shape_.steps() * shape_.step() + begin) * width_;
      for (int64_t k = begin; k < end; k += shape_.step(), to += shape_.step() * width_) {
        const Lanes<T> second = value(minimum(k + 1, end - 1));
        write_step(to, value(k), k + 1 < end ? &second : nullptr, width_);
      }
    }
  }

  // values <- weight: (window, inputs, width)
  void gather(int64_t first, int64_t count) {
    float* to = values_;
    for (int64_t place = 0; place < op_.rows * op_.columns; ++place, to += (kInputs - count) * width_)
      for (int64_t i = 0; i < count; ++i, to += width_) {
        const Lanes<T> from = lanes(place, first + i);
        for (int64_t lane = 0; lane < from.count; ++lane) to[lane] = widen(from.at(lane));
        for (int64_t lane = from.count; lane < width_; ++lane) to[lane] = 0;
      }
  }

  template <int kTile>
  void transform(int64_t first, int64_t count) {
    using W = Winograd<kTile>;
    constexpr int kTaps = 3, kSide = W::kPoints;
    for (int64_t at = 0; at < count * width_; at += kLanes) {
      Vec<float> half[kSide][kTaps];
      for (int column = 0; column < kTaps; ++column) {
        Vec<float> w[kTaps], u[kSide];
#pragma GCC unroll 3
        for (int row = 0; row < kTaps; ++row)
          w[row] = load(values_ + (row * kTaps + column) * kInputs * width_ + at, AllLanes{});
        W::weights(w, u);
#pragma GCC unroll 9
        for (int i = 0; i < kSide; ++i) half[i][column] = u[i];
      }
      for (int i = 0; i < kSide; ++i) {
        Vec<float> u[kSide];
        W::weights(half[i], u);
#pragma GCC unroll 9
        for (int j = 0; j < kSide; ++j) store(transformed_ + (i * kSide + j) * kPoint + at, u[j]);
      }
    }
    // Each in one run: written one vector at a time they are as many places in memory as there are points.
    const bool streamed = shape_.elements() * int64_t{sizeof(T)} >= kStreamedBytes;
    for (int64_t point = 0; point < kSide * kSide; ++point) {
      const float* const from = transformed_ + point * kPoint;
      float* const to = points_ + shape_.winograd(point, block_) + first * width_;
      for (int64_t at = 0; at < count * width_; at += kLanes) {
        const Vec<float> u = load(from + at, AllLanes{});
        streamed ? stream(to + at, u) : store(to + at, u);
      }
    }
  }

  const ConvRepack& op_;
  const ConvWeights shape_;
  T* const packed_;
  float* const points_;  // Winograd's form
  Arena arena_;
  float* values_;
  float* transformed_;  // (points, kPoint)
  int64_t block_ = 0, width_ = 0;
};

template <class T>
void repack(const ConvRepack& op) {
  const int64_t blocks = shape_of(op).blocks(), pieces = ceil_div(op.inputs, kInputs);
  parallel(blocks * pieces, op.rows * op.columns * kInputs * kWidth, [&](int64_t begin, int64_t end) {
    Repack<T> repack(op);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % pieces * kInputs;
      repack.pack(i / pieces, first, minimum(kInputs, op.inputs - first));
    }
    end_stream();
  });
}

}  // namespace

// The weights of a training step, in the time of reading and writing them.
void conv_repack(const ConvRepack& op) {
  if (op.dtype == DType::kBFloat16)
    repack<BFloat16>(op);
  else
    repack<float>(op);
}

}  // namespace fusedres::FUSEDRES_ISA

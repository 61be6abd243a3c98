#include "conv_weights.h"
#include "walk.h"
#include "winograd.h"

namespace fusedres::FUSEDRES_ISA {
namespace {

constexpr int kLanes = Vec<float>::kLanes;
constexpr int64_t kWidth = ConvWeights::kWidth;
constexpr int64_t kInputs = 16;  // that are packed together
// So many bytes will have left the caches when they are read.
constexpr int64_t kStreamedBytes = int64_t{16} << 20;

class Repack {
 public:
  explicit Repack(const ConvRepack& op)
      : op_(op),
        shape_{DType::kFloat32, 1, op.inputs, op.outputs, op.rows, op.columns, op.tile},
        values_(arena_.take<float>(op.rows * op.columns * kInputs * kWidth)) {}

  // `count` inputs of a block.
  void pack(int64_t block, int64_t first, int64_t count) {
    width_ = shape_.width(block);
    gather(block, first, count);
    for (int64_t tap = 0; tap < op_.rows * op_.columns; ++tap) {
      float* const to = op_.packed + shape_.direct(0, block) + (tap * op_.inputs + first) * width_;
      __builtin_memcpy(to, values_ + tap * kInputs * width_, count * width_ * sizeof(float));
    }
    const bool streamed = shape_.elements() * int64_t{sizeof(float)} >= kStreamedBytes;
    auto write = [&](float* to, Vec<float> u)
                     FUSEDRES_INLINE_LAMBDA { streamed ? stream(to, u) : store(to, u); };
    if (op_.tile == 2) transform<2>(block, first, count, write);
    if (op_.tile == 4) transform<4>(block, first, count, write);
  }

 private:
  // values <- weight: (taps, inputs, width)
  void gather(int64_t block, int64_t first, int64_t count) {
    const int64_t begin = block * kWidth, lanes = minimum(width_, op_.outputs - begin);
    for (int64_t row = 0; row < op_.rows; ++row)
      for (int64_t column = 0; column < op_.columns; ++column) {
        const float* const from = op_.weight + begin * op_.strides[0] + first * op_.strides[1] +
                                  row * op_.strides[2] + column * op_.strides[3];
        float* const to = values_ + (row * op_.columns + column) * kInputs * width_;
        if (op_.strides[0] == 1) {
          for (int64_t i = 0; i < count; ++i)
            for (int64_t lane = 0; lane < lanes; ++lane)
              to[i * width_ + lane] = from[i * op_.strides[1] + lane];
        } else {
          for (int64_t lane = 0; lane < lanes; ++lane)
            for (int64_t i = 0; i < count; ++i)
              to[i * width_ + lane] = from[lane * op_.strides[0] + i * op_.strides[1]];
        }
        for (int64_t i = 0; i < count; ++i)
          for (int64_t lane = lanes; lane < width_; ++lane) to[i * width_ + lane] = 0;
      }
  }

  template <int kTile, class Write>
  void transform(int64_t block, int64_t first, int64_t count, const Write& write) const {
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
#pragma GCC unroll 6
        for (int i = 0; i < kSide; ++i) half[i][column] = u[i];
      }
      for (int i = 0; i < kSide; ++i) {
        Vec<float> u[kSide];
        W::weights(half[i], u);
#pragma GCC unroll 6
        for (int j = 0; j < kSide; ++j)
          write(
              op_.packed + shape_.direct(1, 0) + shape_.winograd(i * kSide + j, block) + first * width_ + at,
              u[j]);
      }
    }
  }

  const ConvRepack& op_;
  const ConvWeights shape_;
  Arena arena_;
  float* values_;
  int64_t width_ = 0;
};

}  // namespace

// The weights of a training step, in the time of reading and writing them.
void conv_repack(const ConvRepack& op) {
  const ConvWeights shape{DType::kFloat32, 1, op.inputs, op.outputs, op.rows, op.columns, op.tile};
  const int64_t blocks = shape.blocks();
  const int64_t pieces = ceil_div(op.inputs, kInputs);
  parallel(blocks * pieces, op.rows * op.columns * kInputs * kWidth, [&](int64_t begin, int64_t end) {
    Repack repack(op);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % pieces * kInputs;
      repack.pack(i / pieces, first, minimum(kInputs, op.inputs - first));
    }
    end_stream();
  });
}

}  // namespace fusedres::FUSEDRES_ISA

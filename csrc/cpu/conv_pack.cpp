#include <cstring>

#include "conv_weights.h"
#include "winograd.h"

namespace fusedres {
namespace {

constexpr int kSide = 3;

// G w G^T of one 3x3 filter, (side, side); in double: it is rounded once.
template <int kTile>
void transform(const double (&w)[kSide][kSide], double* points) {
  using W = Winograd<kTile>;
  double half[W::kPoints][kSide];
  for (int i = 0; i < W::kPoints; ++i)
    for (int column = 0; column < kSide; ++column) {
      half[i][column] = 0;
      for (int row = 0; row < kSide; ++row) half[i][column] += W::filter(i, row) * w[row][column];
    }
  for (int i = 0; i < W::kPoints; ++i)
    for (int j = 0; j < W::kPoints; ++j) {
      double sum = 0;
      for (int column = 0; column < kSide; ++column) sum += half[i][column] * W::filter(j, column);
      *points++ = sum;
    }
}

float widen(float value) { return value; }
float widen(BFloat16 value) {
  const uint32_t bits = uint32_t{value.bits} << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

template <class T>
struct Packing {
  const ConvWeights& shape;
  const T* weight;
  const int64_t* strides;

  T value(int64_t group, int64_t o, int64_t i, int64_t row, int64_t column) const {
    if (o >= shape.outputs) return T{};
    const int64_t output = group * shape.outputs + o;
    return weight[output * strides[0] + i * strides[1] + row * strides[2] + column * strides[3]];
  }

  // Value k of a tap.
  T value(int64_t group, int64_t o, int64_t tap, int64_t k) const {
    if (k >= shape.run()) return T{};
    if (shape.flat()) return value(group, o, k % shape.inputs, tap, k / shape.inputs);
    return value(group, o, k, tap / shape.columns, tap % shape.columns);
  }

  void direct(T* to) const {
    for (int64_t group = 0; group < shape.groups; ++group)
      for (int64_t block = 0; block < shape.blocks(); ++block)
        for (int64_t tap = 0; tap < shape.taps(); ++tap)
          for (int64_t k = 0; k < shape.run(); k += shape.step())
            for (int64_t lane = 0; lane < shape.width(block); ++lane)
              for (int64_t i = 0; i < shape.step(); ++i)
                *to++ = value(group, block * ConvWeights::kWidth + lane, tap, k + i);
  }

  void winograd(float* to) const {
    for (int64_t o = 0; o < shape.padded(); ++o) {
      const int64_t block = o / ConvWeights::kWidth, lane = o % ConvWeights::kWidth;
      for (int64_t i = 0; i < shape.inputs; ++i) {
        double w[kSide][kSide], transformed[kMostPoints * kMostPoints];
        for (int row = 0; row < kSide; ++row)
          for (int column = 0; column < kSide; ++column) w[row][column] = widen(value(0, o, i, row, column));
        if (shape.tile == 2) transform<2>(w, transformed);
        if (shape.tile == 4) transform<4>(w, transformed);
        if (shape.tile == 7) transform<7>(w, transformed);
        for (int64_t point = 0; point < shape.side() * shape.side(); ++point)
          to[shape.winograd(point, block) + i * shape.width(block) + lane] =
              static_cast<float>(transformed[point]);
      }
    }
  }
};

template <class T>
void pack(const ConvWeights& shape, const void* weight, const int64_t* strides, void* packed, int64_t bytes) {
  T* const to = static_cast<T*>(packed);
  std::memset(to + shape.elements(), 0, static_cast<size_t>(bytes - shape.elements() * int64_t{sizeof(T)}));
  const Packing<T> packing{shape, static_cast<const T*>(weight), strides};
  packing.direct(to);
  if (shape.tile > 1) packing.winograd(reinterpret_cast<float*>(to + shape.direct(shape.groups, 0)));
}

}  // namespace

void conv_pack(const ConvWeights& shape, const void* weight, const int64_t* strides, void* packed,
               int64_t bytes) {
  if (shape.dtype == DType::kBFloat16)
    pack<BFloat16>(shape, weight, strides, packed, bytes);
  else
    pack<float>(shape, weight, strides, packed, bytes);
}

}  // namespace fusedres

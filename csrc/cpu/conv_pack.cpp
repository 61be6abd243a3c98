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

}  // namespace

void conv_pack(const ConvWeights& shape, const float* weight, const int64_t* strides, float* packed,
               int64_t count) {
  for (int64_t i = shape.elements(); i < count; ++i) packed[i] = 0;
  const int64_t panel_outputs = shape.padded();
  auto value = [&](int64_t group, int64_t o, int64_t i, int64_t row, int64_t column) {
    if (o >= shape.outputs) return 0.0f;
    const int64_t output = group * shape.outputs + o;
    return weight[output * strides[0] + i * strides[1] + row * strides[2] + column * strides[3]];
  };
  float* to = packed;
  for (int64_t group = 0; group < shape.groups; ++group)
    for (int64_t block = 0; block < shape.blocks(); ++block)
      for (int64_t row = 0; row < shape.rows; ++row)
        for (int64_t column = 0; column < shape.columns; ++column)
          for (int64_t i = 0; i < shape.inputs; ++i)
            for (int64_t lane = 0; lane < shape.width(block); ++lane)
              *to++ = value(group, block * ConvWeights::kWidth + lane, i, row, column);
  if (shape.tile == 1) return;
  const int64_t points = shape.side() * shape.side();
  for (int64_t o = 0; o < panel_outputs; ++o) {
    const int64_t block = o / ConvWeights::kWidth, lane = o % ConvWeights::kWidth;
    for (int64_t i = 0; i < shape.inputs; ++i) {
      double w[kSide][kSide], transformed[kMostPoints * kMostPoints];
      for (int row = 0; row < kSide; ++row)
        for (int column = 0; column < kSide; ++column) w[row][column] = value(0, o, i, row, column);
      if (shape.tile == 2) transform<2>(w, transformed);
      if (shape.tile == 4) transform<4>(w, transformed);
      for (int64_t point = 0; point < points; ++point)
        packed[shape.winograd(point, block) + i * shape.width(block) + lane] =
            static_cast<float>(transformed[point]);
    }
  }
}

}  // namespace fusedres

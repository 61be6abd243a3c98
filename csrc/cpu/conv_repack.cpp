#include "conv_repack.h"

namespace fusedres::FUSEDRES_ISA {
namespace {

constexpr int kLanes = Vec<float>::kLanes;
constexpr int64_t kInputs = 64;  // that are packed together

// Inputs of a block in Winograd's form.
template <class T, int kTile>
void pack_points(const ConvWeights& shape, int64_t block, int64_t first, int64_t count,
                 FreshPoints<T, kTile>& fresh, float* to) {
  constexpr int kSide = Winograd<kTile>::kPoints;
  fresh.place(block, first, count);
  for (int row = 0; row < kSide; ++row) {
    const float* from = fresh.row(row);
    for (int j = 0; j < kSide; ++j, from += fresh.apart())
      __builtin_memcpy(to + shape.winograd(row * kSide + j, block) + first * shape.width(block), from,
                       count * shape.width(block) * sizeof *to);
  }
}

template <class T, int kTile>
void repack(const ConvRepack& op) {
  const RawWeights from{{op.dtype, 1, op.inputs, op.outputs, op.rows, op.columns, kTile}, op.weight};
  const ConvWeights& shape = from.shape;
  T* const packed = static_cast<T*>(op.packed);
  const int64_t pieces = shape.flat() ? 1 : ceil_div(op.inputs, kInputs);
  auto each = [&](int64_t begin, int64_t end, const auto& pack) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % pieces * kInputs;
      pack(i / pieces, first, minimum(kInputs, op.inputs - first));
    }
  };
  parallel(shape.blocks() * pieces, op.rows * op.columns * kInputs * ConvWeights::kWidth,
           [&](int64_t begin, int64_t end) {
             each(begin, end, [&](int64_t block, int64_t first, int64_t count) {
               pack_block(from, block, first, count, packed + shape.direct(0, block));
             });
             if constexpr (kTile > 1) {
               Arena arena;
               FreshPoints<T, kTile> fresh(from, arena);
               each(begin, end, [&](int64_t block, int64_t first, int64_t count) {
                 pack_points(shape, block, first, count, fresh,
                             reinterpret_cast<float*>(packed + shape.direct(1, 0)));
               });
             }
           });
}

template <class T>
void repack(const ConvRepack& op) {
  if (op.tile == 1) repack<T, 1>(op);
  if (op.tile == 2) repack<T, 2>(op);
  if (op.tile == 4) repack<T, 4>(op);
  if constexpr (sizeof(T) < sizeof(float))
    if (op.tile == 7) repack<T, 7>(op);
}

}  // namespace

// The weights of a training step, in little more than the time of reading and writing them.
void conv_repack(const ConvRepack& op) {
  if (op.dtype == DType::kBFloat16)
    repack<BFloat16>(op);
  else
    repack<float>(op);
}

}  // namespace fusedres::FUSEDRES_ISA

#include "backward.h"
#include "batch_norm.h"
#include "isa.h"

namespace fusedres::FUSEDRES_ISA {

// y = act(k * BN_x(x) + BN_r(r)),  BN(t) = (t - mean) * rstd * weight + bias
// x, r, y: (N, C, S) T. First pass: batch statistics of x, and of r where it is normalised. Second: reads x
// and r, writes y. 4 tensors, 5 with a projection; one rounding.
void bn_act_forward(const BnActForward& op) {
  with_accumulation(op.dtype, [&](auto zero) {
    using A = decltype(zero);
    Arena arena;
    find_statistics<A>(op.r, op.shape, op.dtype, arena);
    find_statistics<A>(op.x, op.shape, op.dtype, arena);
    const WideShape wide = widen_rows(op.shape, op.gate, op.mask);
    const auto x = Constants<A>::of(op.x, op.shape.channels), r = Constants<A>::of(op.r, op.shape.channels);
    apply({wide.shape, op.dtype, static_cast<Act>(op.act), op.x.data, op.r.data,
           fold(x, op.gate, wide, arena), r.present() ? fold(r, Gate{}, wide, arena) : Affine{},
           per_image(op.gate) ? wide.shape.channels : 0, op.y, op.mask});
  });
}

// dx = A * k * g + B * (x - mean) + D,  A = weight * rstd,  B = -A * rstd * dweight / M,  D = -A * dbias / M;
// dr the same without k, or g itself. First pass: sums over dy, what tells g, x, r; second: the same tensors
// again, and writes dx and dr: 6 tensors, 8 with a projection.
void bn_act_backward(const BnActBackward& op) {
  with_accumulation(op.dtype, [&](auto zero) {
    using A = decltype(zero);
    const int64_t channels = op.shape.channels;
    backward<A>({op.shape,
                 op.dtype,
                 static_cast<Act>(op.act),
                 op.dy,
                 op.y,
                 op.mask,
                 {op.x.data, Constants<A>::of(op.x, channels), op.x.source == Statistics::kBatch},
                 {op.r.data, Constants<A>::of(op.r, channels), op.r.source == Statistics::kBatch},
                 op.gate,
                 op.gradients});
  });
}

}  // namespace fusedres::FUSEDRES_ISA

#include "backward.h"
#include "batch_norm.h"
#include "isa.h"

namespace fusedres::FUSEDRES_ISA {

// y = maxpool(act(BN(x))),  BN(x) = (x - mean) * rstd * weight + bias
// x: (N, C, S) T; y: (N, C, S') T. First pass: batch statistics of x. Second: reads x, writes y and a byte a
// window. act(BN(x)) is never in memory; every window normalises its values anew, from the caches.
void bn_act_pool_forward(const BnActPoolForward& op) {
  with_accumulation(op.dtype, [&](auto zero) {
    using A = decltype(zero);
    Arena arena;
    find_statistics<A>(op.x, op.shape, op.dtype, arena);
    const auto x = Constants<A>::of(op.x, op.shape.channels);
    pool_apply({op.shape, op.dtype, static_cast<Act>(op.act), op.x.data,
                fold(x, Gate{}, {op.shape, 1}, arena), op.pool, op.y, op.choice});
  });
}

// g = the sum of dy over the windows that chose a place;  dx = A * g + B * (x - mean) + D as in bn_act.
// First pass: sums over x, dy and choice; second: the same again, and writes dx: 3 tensors of x's size.
void bn_act_pool_backward(const BnActPoolBackward& op) {
  with_accumulation(op.dtype, [&](auto zero) {
    using A = decltype(zero);
    const auto x = Constants<A>::of(op.x, op.shape.channels);
    backward<A>({op.shape,
                 op.dtype,
                 Act::kIdentity,
                 op.dy,
                 nullptr,
                 nullptr,
                 {op.x.data, x, op.x.source == Statistics::kBatch},
                 {},
                 {},
                 op.gradients,
                 op.choice,
                 op.pool});
  });
}

}  // namespace fusedres::FUSEDRES_ISA

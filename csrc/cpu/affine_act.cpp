#include "backward.h"
#include "isa.h"

namespace fusedres::FUSEDRES_ISA {

// y = act(k * ((x - mean) * scale + bias) + ((r - mean_r) * scale_r + bias_r))
// x, r, y: (N, C, S) T. Reads x and r, writes y: 3 tensors, one pass, one rounding.
void affine_act_forward(const AffineActForward& op) {
  with_accumulation(op.dtype, [&](auto zero) {
    using A = decltype(zero);
    Arena arena;
    const WideShape wide = widen_rows(op.shape, op.gate, op.mask);
    const auto x = Constants<A>::of(op.x), r = Constants<A>::of(op.r);
    apply({wide.shape, op.dtype, static_cast<Act>(op.act), op.x.data, op.r.data,
           fold(x, op.gate, wide, arena), r.present() ? fold(r, Gate{}, wide, arena) : Affine{},
           per_image(op.gate) ? wide.shape.channels : 0, op.y, op.mask});
  });
}

// dx = k * scale * g,  dr = scale_r * g, and sums for the parameters: at most two passes.
// Reads dy and what tells g, with parameter gradients twice; writes dx and dr.
void affine_act_backward(const AffineActBackward& op) {
  with_accumulation(op.dtype, [&](auto zero) {
    using A = decltype(zero);
    backward<A>({op.shape,
                 op.dtype,
                 static_cast<Act>(op.act),
                 op.dy,
                 op.y,
                 op.mask,
                 {op.x.data, Constants<A>::of(op.x), false},
                 {op.r.data, Constants<A>::of(op.r), false},
                 op.gate,
                 op.gradients});
  });
}

}  // namespace fusedres::FUSEDRES_ISA

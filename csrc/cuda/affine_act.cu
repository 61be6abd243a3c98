#include "backward.cuh"
#include "forward.cuh"

namespace fusedres::cuda {
namespace {

template <class A>
ForwardOperand<A> forward_operand(const AffineOperand& operand) {
  ForwardOperand<A> found{};
  found.data = operand.data;
  found.source = Statistics::kAbsent;
  found.mean = static_cast<const A*>(operand.mean);
  found.weight = static_cast<const A*>(operand.scale);
  found.bias = static_cast<const A*>(operand.bias);
  return found;
}

template <class A>
BackwardOperand<A> backward_operand(const AffineOperand& operand, void* gradient, void* dscale, void* dbias) {
  BackwardOperand<A> found{};
  found.data = operand.data;
  found.mean = static_cast<const A*>(operand.mean);
  found.weight = static_cast<const A*>(operand.scale);
  found.bias = static_cast<const A*>(operand.bias);
  found.gradient = gradient;
  found.dweight = static_cast<A*>(dscale);
  found.dbias = static_cast<A*>(dbias);
  return found;
}

}  // namespace

// y = act(k * ((x - mean) * scale + bias) + ((r - mean_r) * scale_r + bias_r))
// x, r, y: (N, C, S) T. Reads x and r, writes y: 3 tensors, one launch, one rounding.
cudaError_t affine_act_forward(const AffineActForward& op, const Context& context) {
  return with_element(op.dtype, [&](auto element) {
    using T = decltype(element);
    Forward<Accumulation<T>> pass{};
    pass.cut.shape = op.shape;
    pass.act = static_cast<Act>(op.act);
    pass.x = forward_operand<Accumulation<T>>(op.x);
    pass.r = forward_operand<Accumulation<T>>(op.r);
    pass.gate = op.gate;
    pass.y = op.y;
    pass.mask = op.mask;
    return forward<T>(pass, context);
  });
}

// dx = k * scale * g,  dr = scale_r * g, and sums for the parameters.
// Reads dy and what tells g, with parameter gradients once more where they do not stay on chip; writes dx and
// dr.
cudaError_t affine_act_backward(const AffineActBackward& op, const Context& context) {
  return with_element(op.dtype, [&](auto element) {
    using T = decltype(element);
    using A = Accumulation<T>;
    const Gradients& to = op.gradients;
    Backward<A> pass{};
    pass.cut.shape = op.shape;
    pass.act = static_cast<Act>(op.act);
    pass.dy = op.dy;
    pass.y = op.y;
    pass.mask = op.mask;
    pass.x = backward_operand<A>(op.x, to.dx, to.dweight, to.dbias);
    pass.r = backward_operand<A>(op.r, to.dr, to.dweight_r, to.dbias_r);
    pass.gate = op.gate;
    pass.dgate = static_cast<A*>(to.dgate);
    return backward<T>(pass, context);
  });
}

}  // namespace fusedres::cuda

#include "backward.cuh"
#include "forward.cuh"

namespace fusedres::cuda {
namespace {

template <class A>
ForwardOperand<A> forward_operand(const NormOperand& norm) {
  ForwardOperand<A> found{};
  found.data = norm.data;
  found.source = norm.source;
  found.weight = static_cast<const A*>(norm.weight);
  found.bias = static_cast<const A*>(norm.bias);
  found.running_mean = static_cast<A*>(norm.running_mean);
  found.running_var = static_cast<A*>(norm.running_var);
  found.stats = static_cast<A*>(norm.stats);
  found.momentum = static_cast<A>(norm.momentum);
  found.eps = static_cast<A>(norm.eps);
  return found;
}

template <class A>
BackwardOperand<A> backward_operand(const NormOperand& norm, int64_t channels, void* gradient, void* dweight,
                                    void* dbias) {
  BackwardOperand<A> found{};
  found.data = norm.data;
  found.gradient = gradient;
  found.dweight = static_cast<A*>(dweight);
  found.dbias = static_cast<A*>(dbias);
  if (norm.source == Statistics::kAbsent) return found;
  const A* const stats = static_cast<const A*>(norm.stats);
  found.mean = stats;
  found.low = stats + channels;
  found.rstd = stats + 2 * channels;
  found.weight = static_cast<const A*>(norm.weight);
  found.bias = static_cast<const A*>(norm.bias);
  found.from_batch = norm.source == Statistics::kBatch;
  return found;
}

}  // namespace

// y = act(k * BN_x(x) + BN_r(r)),  BN(t) = (t - mean) * rstd * weight + bias
// x, r, y: (N, C, S) T. On chip: reads x and r, writes y, 3 tensors in one launch; else 4, 5 with a
// projection.
cudaError_t bn_act_forward(const BnActForward& op, const Context& context) {
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

// dx = A * k * g + B * (x - mean) + D,  A = weight * rstd,  B = -A * rstd * dweight / M,  D = -A * dbias / M;
// dr the same without k, or g itself. On chip: reads dy, what tells g, x and r, writes dx and dr, 4 tensors
// and a mask, 5 with a projection; else what is reduced is read twice.
cudaError_t bn_act_backward(const BnActBackward& op, const Context& context) {
  return with_element(op.dtype, [&](auto element) {
    using T = decltype(element);
    using A = Accumulation<T>;
    const Gradients& to = op.gradients;
    const int64_t channels = op.shape.channels;
    Backward<A> pass{};
    pass.cut.shape = op.shape;
    pass.act = static_cast<Act>(op.act);
    pass.dy = op.dy;
    pass.y = op.y;
    pass.mask = op.mask;
    pass.x = backward_operand<A>(op.x, channels, to.dx, to.dweight, to.dbias);
    pass.r = backward_operand<A>(op.r, channels, to.dr, to.dweight_r, to.dbias_r);
    pass.gate = op.gate;
    pass.dgate = static_cast<A*>(to.dgate);
    return backward<T>(pass, context);
  });
}

}  // namespace fusedres::cuda

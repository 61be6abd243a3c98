// The ops' operands as the kernels are told of them.
#pragma once

#include "tensors.h"

namespace fusedres {

using OptionalTensor = std::optional<Tensor>;

Gate gate_of(const OptionalTensor& gate);

// A (C,) tensor in the accumulation type, dense: itself, or the copy of one that is not, such as those of a
// model that was converted to half precision as a whole.
class PerChannel {
 public:
  PerChannel() = default;
  PerChannel(const OptionalTensor& t);

  void* data() const { return pointer(wide_); }
  void write_back() const;

 private:
  const OptionalTensor given_;
  const OptionalTensor wide_;
};

struct AffineTensors {
  PerChannel scale, bias, mean;

  AffineOperand operand(const void* data) const { return {data, scale.data(), bias.data(), mean.data()}; }
};

struct NormTensors {
  PerChannel weight, bias, running_mean, running_var;
  Tensor stats;
  Statistics source;
  double momentum, eps;

  NormOperand operand(const void* data) const {
    return {data,   weight.data(), bias.data(), running_mean.data(), running_var.data(), stats.data_ptr(),
            source, momentum,      eps};
  }
  // After the forward: the running statistics that it moved.
  void write_back() const;
};

// What the backward of a norm is told: no running statistics.
NormTensors backward_norm(const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& stats,
                          int64_t statistics);

}  // namespace fusedres

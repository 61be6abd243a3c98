// What conv_act's forms make of its operands.
#pragma once

#include "conv_block.h"

namespace fusedres::FUSEDRES_ISA {

inline ConvWeights weights_of(const ConvAct& op) {
  return {op.dtype,          op.groups, op.inputs / op.groups, op.outputs / op.groups, op.rows.kernel,
          op.columns.kernel, op.tile};
}

// The result of a block of channels of y's pixels from `pixel` on.
template <class T>
ConvResult<T> result_of(const ConvAct& op, int64_t pixel, int64_t group, int64_t block) {
  const int64_t outputs = op.outputs / op.groups, within = block * ConvWeights::kWidth;
  const int64_t channel = group * outputs + within, at = pixel * op.outputs + channel;
  return {op.bias ? op.bias + channel : nullptr,
          op.residual ? static_cast<const T*>(op.residual) + at : nullptr,
          static_cast<T*>(op.y) + at,
          op.outputs,
          minimum(ConvWeights::kWidth, outputs - within),
          static_cast<Act>(op.act),
          op.scale ? op.scale + channel : nullptr};
}

}  // namespace fusedres::FUSEDRES_ISA

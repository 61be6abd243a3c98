// What a library's kernels are to ops.cpp.
#pragma once

#include "tensors.h"

namespace fusedres {

// Each on the device of `like`, with the current number of threads or on the current stream.
void run(const AffineActForward& op, const Tensor& like);
void run(const AffineActBackward& op, const Tensor& like);
void run(const BnActForward& op, const Tensor& like);
void run(const BnActBackward& op, const Tensor& like);

}  // namespace fusedres

// A batch norm's statistics, before the first element is normalised.
#pragma once

#include "../params.h"
#include "parallel.h"

namespace fusedres::FUSEDRES_ISA {

// Fills norm.stats, from the batch, whose running statistics move, or from the running ones.
template <class A>
void find_statistics(const NormOperand& norm, const Shape& shape, DType dtype, Arena& arena);

}  // namespace fusedres::FUSEDRES_ISA

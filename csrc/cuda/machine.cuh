// The few things that only a GPU has.
#pragma once

#include <cooperative_groups.h>

#include "cut.h"
#include "value.cuh"

namespace fusedres::cuda {

FUSEDRES_DEVICE int thread() { return static_cast<int>(threadIdx.x); }

#if defined(__CUDACC__)
// The block's dynamic shared memory.
FUSEDRES_DEVICE unsigned char* shared_memory() {
  extern __shared__ uint4 memory[];
  return reinterpret_cast<unsigned char*>(memory);
}
#endif

// Waits for every block of a cooperative launch; what they wrote before is then seen by all.
FUSEDRES_DEVICE void grid_barrier() { cooperative_groups::this_grid().sync(); }

template <class A>
FUSEDRES_DEVICE A from_lane_xor(A value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

}  // namespace fusedres::cuda

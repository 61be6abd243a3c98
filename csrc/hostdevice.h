#pragma once

#if defined(__CUDACC__)
#define FUSEDRES_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Always inlined: an out-of-line copy compiled for one instruction set could be linked into the code of
// another.
#define FUSEDRES_HOST_DEVICE inline __attribute__((always_inline))
#endif

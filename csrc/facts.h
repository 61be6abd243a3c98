// What a library tells of itself, through functions with C names; csrc/bindings/host.cpp and ctypes ask.
#pragma once

#include <cstdint>

namespace fusedres {

struct CpuFacts {
  int count;
  const char* const* variants;  // from the plainest to the most demanding
  const bool* supported;        // by this machine
};

// One kernel on one device.
struct CudaKernelFacts {
  char name[64];
  int architecture;       // of the machine code that is used: 90 for sm_90
  int registers;          // of a thread
  int blocks;             // at a time on a multiprocessor, with as much shared memory as one may have
  int64_t on_chip_bytes;  // of a tensor that the whole device keeps between the phases
};

}  // namespace fusedres

#define FUSEDRES_FACTS extern "C" __attribute__((visibility("default")))

FUSEDRES_FACTS fusedres::CpuFacts fusedres_cpu_facts();
// The name of the variant that serves a DType on this machine; null where FUSEDRES_CPU_ISA is not a variant's
// name.
FUSEDRES_FACTS const char* fusedres_variant(int dtype);
// The architectures in the library, of machine code and PTX: "800,900", as nvcc's __CUDA_ARCH_LIST__ has it.
FUSEDRES_FACTS const char* fusedres_cuda_architectures();
// The current device's; at most `capacity` of them. The number, or a CUDA error as a negative number.
FUSEDRES_FACTS int fusedres_cuda_kernels(fusedres::CudaKernelFacts* facts, int capacity);

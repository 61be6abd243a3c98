#include "../facts.h"

#include <cstdio>

#include "backward.cuh"
#include "forward.cuh"

#define FUSEDRES_STRING(...) #__VA_ARGS__
#define FUSEDRES_EXPANDED(...) FUSEDRES_STRING(__VA_ARGS__)

const char* fusedres_cuda_architectures() { return FUSEDRES_EXPANDED(__CUDA_ARCH_LIST__); }

int fusedres_cuda_kernels(fusedres::CudaKernelFacts* facts, int capacity) {
  using namespace fusedres::cuda;
  Device device;
  if (const cudaError_t error = Device::current(&device)) return -static_cast<int>(error);
  const struct {
    const char* element;
    cudaError_t (*forward)(const Device&, fusedres::CudaKernelFacts*);
    cudaError_t (*backward)(const Device&, fusedres::CudaKernelFacts*);
  } elements[] = {{"bfloat16", forward_facts<fusedres::BFloat16>, backward_facts<fusedres::BFloat16>},
                  {"float16", forward_facts<fusedres::Half>, backward_facts<fusedres::Half>},
                  {"float32", forward_facts<float>, backward_facts<float>},
                  {"float64", forward_facts<double>, backward_facts<double>}};
  int count = 0;
  for (const auto& of : elements) {
    for (const bool forward : {true, false}) {
      if (count == capacity) return count;
      fusedres::CudaKernelFacts& found = facts[count++];
      std::snprintf(found.name, sizeof found.name, "%s %s", forward ? "forward" : "backward", of.element);
      const cudaError_t error = (forward ? of.forward : of.backward)(device, &found);
      if (error != cudaSuccess) return -static_cast<int>(error);
    }
  }
  return count;
}

// One fault for each of compute-sanitizer's tools: a run in which it does not tell is a run that shows
// nothing.
//
//     nvcc -o canary canary.cu && compute-sanitizer --error-exitcode 9 --tool racecheck ./canary racecheck
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>

// Writes one element behind the allocation.
__global__ void memcheck(int* data, int count) { data[threadIdx.x + 1] = count; }

// Two warps exchange values without a barrier.
__global__ void racecheck(int* data, int) {
  __shared__ int shared[64];
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  data[threadIdx.x] = shared[63 - threadIdx.x];
}

// Reads what nobody wrote.
__global__ void initcheck(int* data, int count) {
  if (data[threadIdx.x] == count) data[0] = 1;
}

// Half a warp waits for the other half, which does not come.
__global__ void synccheck(int* data, int count) {
  if (threadIdx.x % 32 < 16) __syncwarp(0xffffffffu);
  data[threadIdx.x] = count;
}

int main(int count, char** words) {
  constexpr int kThreads = 64;
  int* data = nullptr;
  if (count != 2 || cudaMalloc(&data, kThreads * sizeof(int)) != cudaSuccess) return 2;
  const struct {
    const char* name;
    void (*kernel)(int*, int);
  } faults[] = {
      {"memcheck", memcheck}, {"racecheck", racecheck}, {"initcheck", initcheck}, {"synccheck", synccheck}};
  for (const auto& fault : faults)
    if (std::strcmp(fault.name, words[1]) == 0) fault.kernel<<<1, kThreads>>>(data, kThreads);
  std::printf("%s\n", cudaGetErrorString(cudaDeviceSynchronize()));
  return 0;
}

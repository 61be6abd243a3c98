// Enough of CUDA to run csrc/cuda's kernels on the host: a grid's threads are fibres of one thread, switched
// at barriers and shuffles only. What that can't show is races and missing barriers between such points.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x = 1) : x(x), y(1), z(1) {}
};

namespace emulation {

constexpr size_t kStackBytes = 64 << 10;
constexpr int kWarp = 32;

struct Fibre {
  unsigned thread = 0;
  unsigned block = 0;
  int64_t block_arrivals = 0;  // barriers passed
  int64_t grid_arrivals = 0;
  int64_t shuffles = 0;
  bool started = false;
  bool done = false;
  jmp_buf context;
  ucontext_t start;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
};

// The blocks [first, first + together) of a launch: all of a cooperative one, else one after the other.
struct Grid {
  unsigned blocks;
  unsigned threads;
  unsigned first;
  unsigned together;
  bool cooperative;
  std::vector<Fibre> fibres;
  std::vector<std::vector<unsigned char>> shared;
  std::vector<uint64_t> exchanged;  // two values a thread: by the parity of its shuffles
  jmp_buf scheduler;
  void (*body)(void*);
  void* argument;
};

// What a launch must find: a device guard around it, and the stream that is then current.
inline thread_local int guards = 0;
inline char stream = 0;

inline thread_local Grid* grid = nullptr;
inline thread_local Fibre* current = nullptr;
inline thread_local int64_t progress = 0;  // barriers reached or left, and ends

inline void yield() {
  if (_setjmp(current->context) == 0) _longjmp(grid->scheduler, 1);
}

template <class Count>
void wait_for(unsigned first, unsigned last, Count count) {
  const int64_t mine = ++(current->*count);
  ++progress;
  for (;;) {
    bool all = true;
    for (unsigned i = first; i < last; ++i) {
      const Fibre& other = grid->fibres[i];
      if (other.done && other.*count < mine) std::abort();  // a barrier that not all threads reach
      all = all && other.*count >= mine;
    }
    if (all) {
      ++progress;
      return;
    }
    yield();
  }
}

inline unsigned index() { return (current->block - grid->first) * grid->threads + current->thread; }

inline void block_barrier() {
  const unsigned first = index() - current->thread;
  wait_for(first, first + grid->threads, &Fibre::block_arrivals);
}

inline void grid_barrier() {
  if (!grid->cooperative) std::abort();
  wait_for(0, grid->together * grid->threads, &Fibre::grid_arrivals);
}

template <class T>
T shuffle_xor(T value, int mask) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  const unsigned me = index(), first = me - current->thread % kWarp;
  const size_t parity = static_cast<size_t>(current->shuffles % 2);
  std::memcpy(&grid->exchanged[2 * me + parity], &value, sizeof value);
  wait_for(first, first + kWarp, &Fibre::shuffles);
  T other;
  std::memcpy(&other, &grid->exchanged[2 * (me ^ static_cast<unsigned>(mask)) + parity], sizeof other);
  return other;
}

inline unsigned char* shared_memory() { return grid->shared[current->block - grid->first].data(); }

inline void enter() {
  grid->body(grid->argument);
  current->done = true;
  ++progress;
  _longjmp(grid->scheduler, 1);
}

inline void run(Grid& all, size_t shared_bytes) {
  grid = &all;
  all.fibres = std::vector<Fibre>(size_t{all.together} * all.threads);
  // As a GPU leaves it: whatever was there.
  all.shared.assign(all.together, std::vector<unsigned char>(shared_bytes, 0xff));
  all.exchanged.assign(2 * all.fibres.size(), ~uint64_t{0});
  for (size_t i = 0; i < all.fibres.size(); ++i) {
    Fibre& fibre = all.fibres[i];
    fibre.thread = static_cast<unsigned>(i % all.threads);
    fibre.block = all.first + static_cast<unsigned>(i / all.threads);
    getcontext(&fibre.start);
    fibre.start.uc_stack.ss_sp = fibre.stack.get();
    fibre.start.uc_stack.ss_size = kStackBytes;
    makecontext(&fibre.start, enter, 0);
  }
  // Each block as far as it comes alone: what it wants of the others without waiting for them is not there
  // yet.
  static thread_local size_t i;  // not in registers, which a jump could lose
  static thread_local int64_t before;
  static thread_local unsigned block, left;
  for (left = 1; left > 0;) {
    left = 0;
    for (block = 0; block < all.together; ++block) {
      do {
        before = progress;
        for (i = size_t{block} * all.threads; i < (size_t{block} + 1) * all.threads; ++i) {
          Fibre& fibre = all.fibres[i];
          if (fibre.done) continue;
          current = &fibre;
          if (_setjmp(all.scheduler) != 0) continue;
          if (fibre.started) _longjmp(fibre.context, 1);
          fibre.started = true;
          setcontext(&fibre.start);
        }
      } while (progress != before);
      for (i = size_t{block} * all.threads; i < (size_t{block} + 1) * all.threads; ++i)
        left += !all.fibres[i].done;
    }
  }
  grid = nullptr;
}

// FUSEDRES_EMULATED_<NAME>: what the device under emulation is like.
inline int setting(const char* name, int otherwise) {
  const char* const text = std::getenv(name);
  return text ? std::atoi(text) : otherwise;
}

}  // namespace emulation

// What threadIdx and its like read, at the fibre that asks.
template <unsigned (*kRead)()>
struct EmulatedIndex {
  struct {
    operator unsigned() const { return kRead(); }
  } x;
};
inline unsigned emulated_thread() { return emulation::current->thread; }
inline unsigned emulated_block() { return emulation::current->block; }
inline unsigned emulated_blocks() { return emulation::grid->blocks; }
inline constexpr EmulatedIndex<emulated_thread> threadIdx{};
inline constexpr EmulatedIndex<emulated_block> blockIdx{};
inline constexpr EmulatedIndex<emulated_blocks> gridDim{};

inline void __syncthreads() { emulation::block_barrier(); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulation::shuffle_xor(value, mask);
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t emulated_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

namespace fusedres::cuda {
inline unsigned char* shared_memory() { return emulation::shared_memory(); }
}  // namespace fusedres::cuda

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorCooperativeLaunchTooLarge = 82 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrCooperativeLaunch
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative };
using cudaStream_t = void*;

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "an error of the emulation";
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = emulation::setting("FUSEDRES_EMULATED_MULTIPROCESSORS", 3);
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = emulation::setting("FUSEDRES_EMULATED_SHARED_BYTES", 99 << 10);
      break;
    case cudaDevAttrCooperativeLaunch:
      *value = emulation::setting("FUSEDRES_EMULATED_COOPERATIVE", 1);
      break;
  }
  return cudaSuccess;
}

#define __CUDA_ARCH_LIST__ 0

struct cudaFuncAttributes {
  int binaryVersion;
  int numRegs;
};

template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel) {
  *attributes = {0, 0};
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
  return bytes <= emulation::setting("FUSEDRES_EMULATED_SHARED_BYTES", 99 << 10) ? cudaSuccess
                                                                                 : cudaErrorInvalidValue;
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}

template <class P>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P), const P& parameters) {
  struct Call {
    void (*kernel)(P);
    const P& parameters;
  } call{kernel, parameters};
  if (emulation::guards == 0 || config->stream != &emulation::stream) return cudaErrorInvalidValue;
  const bool cooperative = config->attrs[0].val.cooperative;
  if (cooperative &&
      config->gridDim.x > static_cast<unsigned>(emulation::setting("FUSEDRES_EMULATED_MULTIPROCESSORS", 3)))
    return cudaErrorCooperativeLaunchTooLarge;
  emulation::Grid grid;
  grid.threads = config->blockDim.x;
  grid.cooperative = cooperative;
  grid.body = [](void* argument) {
    const Call& call = *static_cast<Call*>(argument);
    call.kernel(call.parameters);
  };
  grid.argument = &call;
  grid.blocks = config->gridDim.x;
  grid.together = cooperative ? grid.blocks : 1;
  for (grid.first = 0; grid.first < grid.blocks; grid.first += grid.together)
    emulation::run(grid, config->dynamicSmemBytes);
  return cudaSuccess;
}

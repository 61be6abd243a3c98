// From an op to launches: which pass where, how many blocks, what stays on chip.
#pragma once

#include <initializer_list>

#include "../facts.h"
#include "ops.h"
#include "reduce.cuh"

namespace fusedres::cuda {

enum class Phases { kReduce, kApply, kBoth };

// What a kernel keeps on chip: a pack a thread, step and tensor, behind its head.
struct Tile {
  int64_t pack_bytes;
  int tensors;
  int unroll;
  int64_t head_bytes;

  int64_t step_bytes() const { return pack_bytes * tensors * kThreads; }
  // Steps that fit, whole ones of the loops.
  int64_t most_steps(int64_t shared_bytes) const {
    return (shared_bytes - head_bytes) / step_bytes() / unroll * unroll;
  }
};

struct Device {
  int multiprocessors;
  int shared_bytes;  // of a block, at most
  int cooperative;

  static cudaError_t current(Device* device);
};

inline cudaError_t Device::current(Device* device) {
  int id;
  if (const cudaError_t error = cudaGetDevice(&id)) return error;
  if (const cudaError_t error =
          cudaDeviceGetAttribute(&device->multiprocessors, cudaDevAttrMultiProcessorCount, id))
    return error;
  if (const cudaError_t error =
          cudaDeviceGetAttribute(&device->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, id))
    return error;
  return cudaDeviceGetAttribute(&device->cooperative, cudaDevAttrCooperativeLaunch, id);
}

// A block's consecutive units.
struct Share {
  int begin, end;

  explicit FUSEDRES_DEVICE Share(int units)
      : begin(first(units, blockIdx.x)), end(first(units, blockIdx.x + 1)) {}

 private:
  static FUSEDRES_DEVICE int first(unsigned units, unsigned block) {
    const unsigned each = units / gridDim.x, more = units % gridDim.x;
    return static_cast<int>(block * each + (block < more ? block : more));
  }
};

// How many blocks of a kernel run at the same time.
template <class Op>
cudaError_t resident_blocks(void (*kernel)(Op), const Device& device, int64_t shared_bytes, int64_t* blocks) {
  const int bytes = static_cast<int>(shared_bytes);
  if (const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes))
    return error;
  int each = 0;
  if (const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kThreads, bytes))
    return error;
  *blocks = int64_t{each} * device.multiprocessors;
  return cudaSuccess;
}

template <class Op>
cudaError_t launch(void (*kernel)(Op), const Op& op, int64_t blocks, int64_t shared_bytes, bool cooperative,
                   const Context& context) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = cooperative;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = context.stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, op);
}

// A kernel's facts on the current device, all but its name.
template <class Op>
cudaError_t kernel_facts(void (*kernel)(Op), const Device& device, const Tile& tile, CudaKernelFacts* facts) {
  cudaFuncAttributes attributes;
  if (const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel)) return error;
  int64_t blocks;
  if (const cudaError_t error = resident_blocks(kernel, device, device.shared_bytes, &blocks)) return error;
  facts->architecture = attributes.binaryVersion;
  facts->registers = attributes.numRegs;
  facts->blocks = static_cast<int>(blocks / device.multiprocessors);
  facts->on_chip_bytes =
      tile.most_steps(device.shared_bytes) * tile.pack_bytes * kThreads * device.multiprocessors;
  return cudaSuccess;
}

// Units a block has of a pass that no other pass waits for: few, or the last blocks would work alone.
constexpr int64_t kApplyUnits = 4;
// Values a thread adds up before its sum is merged with others.
constexpr int64_t kLongestRun = 64;
// One launch re-reads what does not stay on chip; from this many times of that on, two launches do.
constexpr int64_t kFarBeyond = 4;

// f(T{}) for a data type.
template <class F>
cudaError_t with_element(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kFloat64:
      return f(double{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat16:
      return f(Half{});
  }
  return cudaErrorInvalidValue;
}

inline int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }
inline int64_t ceil_div(int64_t value, int64_t by) { return (value + by - 1) / by; }

// One pass over the whole tensor in a launch of its own.
template <class Op>
cudaError_t launch_pass(void (*kernel)(Op), Op op, Phases phases, const Device& device, const Tile& tile,
                        const Context& context) {
  int64_t blocks;
  if (const cudaError_t error = resident_blocks(kernel, device, tile.head_bytes, &blocks)) return error;
  op.phases = phases;
  op.resident = 0;
  return launch(kernel, op, at_most(op.cut.units(), blocks), tile.head_bytes, false, context);
}

// The op in as few launches as it can be: one where nothing is reduced, one cooperative launch where the
// tensor, or a good part of it, stays on chip, else two. op.cut comes in whole groups.
template <class Op, class P>
cudaError_t in_phases(void (*kernel)(Op), Op op, P* Op::* partials, int reductions, Tile tile,
                      const Context& context) {
  Device device;
  if (const cudaError_t error = Device::current(&device)) return error;
  const Cut whole = op.cut;
  const int64_t blocks = device.multiprocessors;
  if (reductions == 0) {
    op.cut = cut_parts(whole, ceil_div(kApplyUnits * blocks, whole.groups));
    return launch_pass(kernel, op, Phases::kApply, device, tile, context);
  }

  const auto allocate = [&] {
    const int64_t count = reductions * op.cut.parts * op.cut.padded_channels();
    op.*partials = static_cast<P*>(context.allocate(context.owner, static_cast<size_t>(count) * sizeof(P)));
  };
  op.cut = cut_parts(whole, whole.groups < blocks ? blocks / whole.groups : 1);
  const int64_t most = tile.most_steps(device.shared_bytes);
  op.resident = static_cast<int>(at_most(ceil_div(op.cut.steps(), tile.unroll) * tile.unroll, most));
  if (op.cut.steps() <= kFarBeyond * most && (device.cooperative || op.cut.parts == 1)) {
    const int64_t shared_bytes = tile.head_bytes + op.resident * tile.step_bytes(), units = op.cut.units();
    int64_t at_once;
    if (const cudaError_t error = resident_blocks(kernel, device, shared_bytes, &at_once)) return error;
    if (op.cut.parts == 1 || units <= at_once) {
      allocate();
      op.phases = Phases::kBoth;
      return launch(kernel, op, at_most(units, at_once), shared_bytes, op.cut.parts > 1, context);
    }
  }
  const int64_t runs = ceil_div(whole.steps(), kLongestRun), spread = ceil_div(blocks, whole.groups);
  op.cut = cut_parts(whole, runs > spread ? runs : spread);
  allocate();
  if (const cudaError_t error = launch_pass(kernel, op, Phases::kReduce, device, tile, context)) return error;
  return launch_pass(kernel, op, Phases::kApply, device, tile, context);
}

// Whether every row of the tensors allows whole packs.
inline bool fits_packs(const Shape& shape, int pack, std::initializer_list<const void*> tensors) {
  constexpr uintptr_t kAlignment = 16;
  if ((shape.order == Order::kPixels ? shape.channels : shape.pixels) % pack != 0) return false;
  for (const void* tensor : tensors)
    if (reinterpret_cast<uintptr_t>(tensor) % kAlignment != 0) return false;
  return true;
}

}  // namespace fusedres::cuda

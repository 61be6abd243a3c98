// What of the CPU library the emulated tile unit's convolutions need: one variant, and torch's threads.
#include <torch/csrc/stable/ops.h>

#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace fusedres {

void parallel_for(int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
  torch::stable::parallel_for(0, count, grain,
                              [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

int64_t thread_count() { return torch::stable::get_num_threads(); }

const Variant& variant_for(DType) {
  static const Variant variant = [] {
    Variant emulated{};
    emulated.conv_act = amx::conv_act;
    emulated.conv_repack = portable::conv_repack;
    emulated.conv_dweight = amx::conv_dweight;
    return emulated;
  }();
  return variant;
}

}  // namespace fusedres

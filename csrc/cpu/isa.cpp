#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fusedres {
namespace {

#define FUSEDRES_VARIANT(isa, training, supported, serves) \
  {#isa,                                                   \
   supported,                                              \
   serves,                                                 \
   isa::affine_act_forward,                                \
   isa::affine_act_backward,                               \
   isa::bn_act_forward,                                    \
   isa::bn_act_backward,                                   \
   isa::bn_act_pool_forward,                               \
   isa::bn_act_pool_backward,                              \
   isa::conv_act,                                          \
   training(isa)}

#define FUSEDRES_TRAINING(isa) isa::conv_repack, isa::conv_dweight
#define FUSEDRES_NO_TRAINING(isa) nullptr, nullptr

const Variant kVariants[] = {
    FUSEDRES_VARIANT(
        portable, FUSEDRES_TRAINING, [] { return true; }, [](DType) { return true; }),
#if defined(__x86_64__)
    FUSEDRES_VARIANT(
        avx2, FUSEDRES_TRAINING,
        [] {
          return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                 __builtin_cpu_supports("f16c");
        },
        [](DType dtype) { return dtype != DType::kFloat64; }),
    FUSEDRES_VARIANT(
        avx512, FUSEDRES_TRAINING,
        [] {
          return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
        },
        [](DType dtype) { return dtype != DType::kFloat64; }),
    FUSEDRES_VARIANT(
        avx512_bf16, FUSEDRES_NO_TRAINING,
        [] { return kVariants[2].supported() && __builtin_cpu_supports("avx512bf16"); },
        [](DType dtype) { return dtype == DType::kBFloat16; }),
#endif
};
constexpr int kCount = sizeof kVariants / sizeof kVariants[0];
#undef FUSEDRES_VARIANT
#undef FUSEDRES_TRAINING
#undef FUSEDRES_NO_TRAINING

// The index of the variant that FUSEDRES_CPU_ISA names, the last one if it is unset.
int find_cap() {
  const char* const wanted = std::getenv("FUSEDRES_CPU_ISA");
  if (!wanted || !*wanted) return kCount - 1;
  std::string choices;
  for (int i = 0; i < kCount; ++i) {
    if (std::string{wanted} == kVariants[i].name) return i;
    choices += std::string{i ? ", " : ""} + kVariants[i].name;
  }
  throw std::invalid_argument("FUSEDRES_CPU_ISA must be one of " + choices + "; got '" + wanted + "'");
}

}  // namespace

Variants variants() { return {kVariants, kCount}; }

const Variant& variant_for(DType dtype) {
  static const int cap = find_cap();
  int i = cap;
  while (!kVariants[i].supported() || !kVariants[i].serves(dtype)) --i;
  return kVariants[i];
}

}  // namespace fusedres

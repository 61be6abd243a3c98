#include "isa.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fusedres {
namespace {

// Whether there is a tile unit for bfloat16 and the system lets this process use it: to be asked for, once.
bool has_tiles() {
#if defined(FUSEDRES_EMULATED_TILES)
  return true;
#elif defined(__x86_64__) && defined(__linux__)
  constexpr unsigned kBFloat16 = 1u << 22, kTiles = 1u << 24;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  static const bool permitted = [] {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kBFloat16) && (edx & kTiles) &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return permitted;
#else
  return false;
#endif
}

#if defined(__x86_64__)

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_pairs() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

#endif

#define FUSEDRES_VARIANT(name, isa, convolutions, repack, supported, serves, pays) \
  {name,                                                                           \
   supported,                                                                      \
   serves,                                                                         \
   pays,                                                                           \
   isa::affine_act_forward,                                                        \
   isa::affine_act_backward,                                                       \
   isa::bn_act_forward,                                                            \
   isa::bn_act_backward,                                                           \
   isa::bn_act_pool_forward,                                                       \
   isa::bn_act_pool_backward,                                                      \
   isa::max_pool,                                                                  \
   isa::mean,                                                                      \
   isa::connect,                                                                   \
   convolutions::conv_act,                                                         \
   repack,                                                                         \
   convolutions::conv_dweight}

bool always() { return true; }
bool serves_all(DType) { return true; }
bool serves_floats(DType dtype) { return dtype != DType::kFloat64; }
bool serves_bfloat16(DType dtype) { return dtype == DType::kBFloat16; }

const Variant kVariants[] = {
    FUSEDRES_VARIANT("portable", portable, portable, portable::conv_repack, always, serves_all, always),
#if defined(__x86_64__)
    FUSEDRES_VARIANT(
        "avx2", avx2, avx2, avx2::conv_repack,
        [] {
          return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                 __builtin_cpu_supports("f16c");
        },
        serves_floats, always),
    FUSEDRES_VARIANT("avx512", avx512, avx512, avx512::conv_repack, has_avx512, serves_floats, always),
    FUSEDRES_VARIANT("avx512_widened", avx512_bf16, avx512_widened, nullptr, has_pairs, serves_bfloat16,
                     always),
    FUSEDRES_VARIANT("avx512_bf16", avx512_bf16, avx512_bf16, nullptr, has_pairs, serves_bfloat16,
                     avx512_bf16::pairs_pay),
    FUSEDRES_VARIANT(
        "amx", avx512_bf16, amx, nullptr, [] { return has_pairs() && has_tiles(); }, serves_bfloat16, always),
#endif
};
constexpr int kCount = sizeof kVariants / sizeof kVariants[0];
#undef FUSEDRES_VARIANT

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
  auto fits = [&](const Variant& variant) {
    return variant.serves(dtype) && variant.supported() && (&variant == kVariants + cap || variant.pays());
  };
  int i = cap;
  while (!fits(kVariants[i])) --i;
  return kVariants[i];
}

}  // namespace fusedres

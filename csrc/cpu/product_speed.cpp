#include "isa.h"

#if defined(__x86_64__)
namespace fusedres::avx512_bf16 {
namespace {

// The least time that a run of independent products took.
template <class Run>
unsigned long long least_ticks(const Run& run) {
  constexpr int kRounds = 32;
  unsigned long long least = ~0ull;
  for (int round = 0; round < kRounds; ++round) {
    const unsigned long long begin = __builtin_ia32_rdtsc();
    run();
    const unsigned long long ticks = __builtin_ia32_rdtsc() - begin;
    if (ticks < least) least = ticks;
  }
  return least;
}

// In assembly, since it is the processor that is asked and not the compiler.
#define FUSEDRES_PRODUCTS(instruction)                                                                    \
  [] {                                                                                                    \
    long steps = 256;                                                                                     \
    asm volatile(                                                                                         \
        ".irp i, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 15\n vpxord %%zmm\\i, %%zmm\\i, %%zmm\\i\n .endr\n"        \
        "1:\n .irp i, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9\n " instruction                                        \
        " %%zmm15, %%zmm15, %%zmm\\i\n .endr\n"                                                           \
        "dec %0\n jnz 1b\n vzeroupper"                                                                    \
        : "+r"(steps)                                                                                     \
        :                                                                                                 \
        : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm15"); \
  }

}  // namespace

bool pairs_pay() {
  static const bool pay =
      least_ticks(FUSEDRES_PRODUCTS("vdpbf16ps")) < 2 * least_ticks(FUSEDRES_PRODUCTS("vfmadd231ps"));
  return pay;
}
#undef FUSEDRES_PRODUCTS

}  // namespace fusedres::avx512_bf16
#endif

// The variants of the kernels, and which of them runs.
#pragma once

#include "../params.h"

// A variant is one compilation of csrc/cpu's kernels, in a namespace of its own.
#define FUSEDRES_DECLARE_VARIANT(isa)                     \
  namespace fusedres::isa {                               \
  void affine_act_forward(const AffineActForward& op);    \
  void affine_act_backward(const AffineActBackward& op);  \
  void bn_act_forward(const BnActForward& op);            \
  void bn_act_backward(const BnActBackward& op);          \
  void bn_act_pool_forward(const BnActPoolForward& op);   \
  void bn_act_pool_backward(const BnActPoolBackward& op); \
  void max_pool(const MaxPool& op);                       \
  void mean(const Mean& op);                              \
  void connect(const Connect& op);                        \
  void conv_act(const ConvAct& op);                       \
  void conv_repack(const ConvRepack& op);                 \
  bool conv_dweight(const ConvDweight& op);               \
  }

FUSEDRES_DECLARE_VARIANT(portable)
#if defined(__x86_64__)
FUSEDRES_DECLARE_VARIANT(avx2)
FUSEDRES_DECLARE_VARIANT(avx512)
FUSEDRES_DECLARE_VARIANT(avx512_bf16)
#endif
#undef FUSEDRES_DECLARE_VARIANT

// These have convolutions alone: products in float32 where avx512_bf16's are slower, and the tile unit.
#define FUSEDRES_DECLARE_CONVOLUTIONS(isa)  \
  namespace fusedres::isa {                 \
  void conv_act(const ConvAct& op);         \
  bool conv_dweight(const ConvDweight& op); \
  }

FUSEDRES_DECLARE_CONVOLUTIONS(avx512_widened)
FUSEDRES_DECLARE_CONVOLUTIONS(amx)
#undef FUSEDRES_DECLARE_CONVOLUTIONS

namespace fusedres::avx512_bf16 {
// Whether an instruction that multiplies pairs of bfloat16 takes less than two that multiply float32: it
// takes as long as one on some processors, as four on others. Measured once, in 0.1 ms.
bool pairs_pay();
}  // namespace fusedres::avx512_bf16

namespace fusedres {

struct Variant {
  const char* name;
  bool (*supported)();          // by this machine, and permitted by its system
  bool (*serves)(DType dtype);  // was compiled for it
  bool (*pays)();               // is faster than the one before, on this machine
  void (*affine_act_forward)(const AffineActForward& op);
  void (*affine_act_backward)(const AffineActBackward& op);
  void (*bn_act_forward)(const BnActForward& op);
  void (*bn_act_backward)(const BnActBackward& op);
  void (*bn_act_pool_forward)(const BnActPoolForward& op);
  void (*bn_act_pool_backward)(const BnActPoolBackward& op);
  void (*max_pool)(const MaxPool& op);
  void (*mean)(const Mean& op);
  void (*connect)(const Connect& op);
  void (*conv_act)(const ConvAct& op);
  void (*conv_repack)(const ConvRepack& op);    // null where the variant has no float32
  bool (*conv_dweight)(const ConvDweight& op);  // false: a sum is not finite, and dweight is not to be used
};

struct Variants {
  const Variant* all;
  int count;
};

// From the plainest to the most demanding.
Variants variants();

// The most demanding variant that the machine supports, FUSEDRES_CPU_ISA allows and the data type has, and
// that pays or is the one that FUSEDRES_CPU_ISA names. A bad value of it throws std::invalid_argument with
// the choices.
const Variant& variant_for(DType dtype);

}  // namespace fusedres

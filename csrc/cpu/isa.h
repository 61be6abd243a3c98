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

// The tile unit has convolutions alone.
namespace fusedres::amx {
void conv_act(const ConvAct& op);
bool conv_dweight(const ConvDweight& op);
}  // namespace fusedres::amx

namespace fusedres {

struct Variant {
  const char* name;
  bool (*supported)();          // by this machine, and permitted by its system
  bool (*serves)(DType dtype);  // was compiled for it
  void (*affine_act_forward)(const AffineActForward& op);
  void (*affine_act_backward)(const AffineActBackward& op);
  void (*bn_act_forward)(const BnActForward& op);
  void (*bn_act_backward)(const BnActBackward& op);
  void (*bn_act_pool_forward)(const BnActPoolForward& op);
  void (*bn_act_pool_backward)(const BnActPoolBackward& op);
  void (*max_pool)(const MaxPool& op);
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

// The most demanding variant that the machine supports, FUSEDRES_CPU_ISA allows and the data type has. A bad
// value of FUSEDRES_CPU_ISA throws std::invalid_argument with the choices.
const Variant& variant_for(DType dtype);

}  // namespace fusedres

// The catalogue's activations by code, for those that are not worth a kernel of their own.
#pragma once

#include "math.h"

namespace fusedres::FUSEDRES_ISA {

// Calls and not inlined: each pass would hold every activation otherwise. A call is small beside an exp.
template <class V>
__attribute__((noinline)) V activate(Act act, V z) {
  switch (act) {
#define FUSEDRES_VALUE(Struct, name, code) \
  case Act::k##Struct:                     \
    return Struct::value(z);
    FUSEDRES_ACTIVATIONS(FUSEDRES_VALUE)
#undef FUSEDRES_VALUE
  }
  __builtin_unreachable();
}

template <class V>
__attribute__((noinline)) V activation_gradient(Act act, V y_or_z, V dy) {
  switch (act) {
#define FUSEDRES_GRADIENT(Struct, name, code) \
  case Act::k##Struct:                        \
    return Struct::gradient(y_or_z, dy);
    FUSEDRES_ACTIVATIONS(FUSEDRES_GRADIENT)
#undef FUSEDRES_GRADIENT
  }
  __builtin_unreachable();
}

inline bool from_output(Act act) {
  switch (act) {
#define FUSEDRES_FROM_OUTPUT(Struct, name, code) \
  case Act::k##Struct:                           \
    return Struct::kFromOutput;
    FUSEDRES_ACTIVATIONS(FUSEDRES_FROM_OUTPUT)
#undef FUSEDRES_FROM_OUTPUT
  }
  __builtin_unreachable();
}

}  // namespace fusedres::FUSEDRES_ISA

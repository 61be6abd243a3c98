// The catalogue's activations by code. The branch is the same for all threads.
#pragma once

#include "value.cuh"

namespace fusedres::cuda {

template <class A>
FUSEDRES_DEVICE A activate(Act act, A z) {
  const Real<A> value{z};
  switch (act) {
#define FUSEDRES_VALUE(Struct, name, code) \
  case Act::k##Struct:                     \
    return Struct::value(value).v;
    FUSEDRES_ACTIVATIONS(FUSEDRES_VALUE)
#undef FUSEDRES_VALUE
  }
  return z;
}

template <class A>
FUSEDRES_DEVICE A activation_gradient(Act act, A y_or_z, A dy) {
  const Real<A> at{y_or_z}, gradient{dy};
  switch (act) {
#define FUSEDRES_GRADIENT(Struct, name, code) \
  case Act::k##Struct:                        \
    return Struct::gradient(at, gradient).v;
    FUSEDRES_ACTIVATIONS(FUSEDRES_GRADIENT)
#undef FUSEDRES_GRADIENT
  }
  return dy;
}

inline bool from_output(Act act) {
  switch (act) {
#define FUSEDRES_FROM_OUTPUT(Struct, name, code) \
  case Act::k##Struct:                           \
    return Struct::kFromOutput;
    FUSEDRES_ACTIVATIONS(FUSEDRES_FROM_OUTPUT)
#undef FUSEDRES_FROM_OUTPUT
  }
  return true;
}

// Neither needs more than a select: worth instantiations without the others' code.
FUSEDRES_HOST_DEVICE bool is_select(Act act) { return act == Act::kIdentity || act == Act::kRelu; }

}  // namespace fusedres::cuda

// What the library says of itself; Python asks through ctypes.
#include <exception>

#include "isa.h"

// The name of the variant that serves a DType on this machine; null where FUSEDRES_CPU_ISA is not a variant's
// name.
extern "C" __attribute__((visibility("default"))) const char* fusedres_variant(int dtype) {
  try {
    return fusedres::variant_for(static_cast<fusedres::DType>(dtype)).name;
  } catch (const std::exception&) {
    return nullptr;
  }
}

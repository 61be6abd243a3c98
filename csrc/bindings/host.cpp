// Facts about the compiled library, as a module of its own: the kernels work without it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "../cpu/isa.h"

namespace {

std::vector<std::string> variants_present() {
  std::vector<std::string> names;
  for (int i = 0; i < fusedres::variants().count; ++i) names.emplace_back(fusedres::variants().all[i].name);
  return names;
}

std::vector<std::string> variants_supported() {
  std::vector<std::string> names;
  for (int i = 0; i < fusedres::variants().count; ++i)
    if (fusedres::variants().all[i].supported()) names.emplace_back(fusedres::variants().all[i].name);
  return names;
}

}  // namespace

PYBIND11_MODULE(fusedres_host, m) {
  m.doc() = "What the native library was compiled with and which of its variants runs here.";
  m.def("variants_present", &variants_present);
  m.def("variants_supported", &variants_supported);
  m.def(
      "variant", [] { return fusedres::variant_for(fusedres::DType::kFloat32).name; },
      "The variant that serves float32, FUSEDRES_CPU_ISA considered.");
  m.def(
      "variant_bfloat16", [] { return fusedres::variant_for(fusedres::DType::kBFloat16).name; },
      "The variant that serves bfloat16.");
  m.attr("compiler") = __VERSION__;
  m.attr("flags") = FUSEDRES_FLAGS;
}

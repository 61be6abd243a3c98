// Facts about the compiled libraries, as a module of its own: the kernels work without it.
#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "../facts.h"
#include "../params.h"

namespace py = pybind11;

namespace {

// A function of a library that is loaded already.
template <class Function>
Function* find(const std::string& library, const char* name) {
  void* const handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  void* const found = handle ? dlsym(handle, name) : nullptr;
  if (!found) throw std::runtime_error(dlerror());
  return reinterpret_cast<Function*>(found);
}

py::dict cpu(const std::string& library) {
  const fusedres::CpuFacts facts = find<decltype(fusedres_cpu_facts)>(library, "fusedres_cpu_facts")();
  const auto variant = find<decltype(fusedres_variant)>(library, "fusedres_variant");
  py::dict variants;
  for (int i = 0; i < facts.count; ++i) variants[facts.variants[i]] = facts.supported[i];
  py::dict found;
  found["variants"] = variants;
  // None where FUSEDRES_CPU_ISA is not a variant's name.
  found["float32"] = variant(static_cast<int>(fusedres::DType::kFloat32));
  found["bfloat16"] = variant(static_cast<int>(fusedres::DType::kBFloat16));
  return found;
}

std::string cuda_architectures(const std::string& library) {
  return find<decltype(fusedres_cuda_architectures)>(library, "fusedres_cuda_architectures")();
}

py::list cuda_kernels(const std::string& library) {
  constexpr int kMost = 32;
  fusedres::CudaKernelFacts facts[kMost];
  const int count = find<decltype(fusedres_cuda_kernels)>(library, "fusedres_cuda_kernels")(facts, kMost);
  if (count < 0) throw std::runtime_error("CUDA error " + std::to_string(-count));
  py::list found;
  for (int i = 0; i < count; ++i) {
    py::dict kernel;
    kernel["name"] = facts[i].name;
    kernel["architecture"] = facts[i].architecture;
    kernel["registers"] = facts[i].registers;
    kernel["blocks_per_multiprocessor"] = facts[i].blocks;
    kernel["on_chip_bytes"] = facts[i].on_chip_bytes;
    found.append(kernel);
  }
  return found;
}

}  // namespace

PYBIND11_MODULE(fusedres_host, m) {
  m.doc() =
      "What the compiled libraries hold, and what of it runs here. Each function takes a library's path.";
  m.def("cpu", &cpu, "The variants in the CPU library, whether this machine runs them, and those in use.");
  m.def("cuda_architectures", &cuda_architectures,
        "Those of the code in the CUDA library, PTX included: 800,900.");
  m.def("cuda_kernels", &cuda_kernels, "What the kernels take and keep on chip on the current device.");
  m.attr("compiler") = __VERSION__;
}

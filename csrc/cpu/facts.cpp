#include "../facts.h"

#include <exception>

#include "isa.h"

fusedres::CpuFacts fusedres_cpu_facts() {
  constexpr int kMost = 8;
  static const char* names[kMost];
  static bool supported[kMost];
  const fusedres::Variants variants = fusedres::variants();
  for (int i = 0; i < variants.count; ++i) {
    names[i] = variants.all[i].name;
    supported[i] = variants.all[i].supported();
  }
  return {variants.count, names, supported};
}

const char* fusedres_variant(int dtype) {
  try {
    return fusedres::variant_for(static_cast<fusedres::DType>(dtype)).name;
  } catch (const std::exception&) {
    return nullptr;
  }
}

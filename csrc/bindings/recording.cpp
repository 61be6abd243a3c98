#include "recording.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <optional>
#include <type_traits>
#include <variant>
#include <vector>

#include "../cpu/isa.h"
#include "tensors.h"

namespace fusedres {
namespace {

using Call = std::variant<ConvAct, MaxPool, Mean>;
static_assert(std::is_trivially_copyable_v<Call>);  // a recording is a tensor of their bytes

thread_local std::optional<std::vector<Call>> recorded;

void compute(const ConvAct& op) { variant_for(op.dtype).conv_act(op); }
void compute(const MaxPool& op) { variant_for(op.dtype).max_pool(op); }
void compute(const Mean& op) { variant_for(op.dtype).mean(op); }

template <class Op>
void note_or_compute(const Op& op) {
  if (recorded)
    recorded->push_back(op);
  else
    compute(op);
}

void record_begin(const Tensor&) { recorded.emplace(); }

// From here on the thread runs what it calls, whatever it recorded.
Tensor record_end(const Tensor& like) {
  STD_TORCH_CHECK(recorded, "record_end: this thread records nothing");
  const std::vector<Call> calls = std::move(*recorded);
  recorded.reset();
  const size_t bytes = calls.size() * sizeof(Call);
  const Tensor recording = empty_bytes(like, {static_cast<int64_t>(bytes)});
  if (bytes) std::memcpy(recording.data_ptr(), calls.data(), bytes);
  return recording;
}

// The kernels' calls as they were recorded: what they point to has to be there still.
void replay(const Tensor& recording) {
  const auto* const begin = static_cast<const Call*>(recording.data_ptr());
  const auto* const end = begin + recording.numel() / sizeof(Call);
  for (const Call* call = begin; call != end; ++call) std::visit([](const auto& op) { compute(op); }, *call);
}

}  // namespace

void run(const ConvAct& op) { note_or_compute(op); }
void run(const MaxPool& op) { note_or_compute(op); }
void run(const Mean& op) { note_or_compute(op); }

}  // namespace fusedres

STABLE_TORCH_LIBRARY_IMPL(FUSEDRES_NAMESPACE, CPU, m) {
  m.impl("record_begin", TORCH_BOX(&fusedres::record_begin));
  m.impl("record_end", TORCH_BOX(&fusedres::record_end));
  m.impl("replay", TORCH_BOX(&fusedres::replay));
}

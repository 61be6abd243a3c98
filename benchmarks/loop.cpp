// A pass over memory and nothing else: whole cache lines are read, combined by one instruction, and written.
#include <torch/csrc/stable/c/shim.h>

#include <cstdint>

#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace {

typedef uint64_t Line __attribute__((vector_size(64)));
constexpr int kMost = 3;  // tensors that a pass reads, or writes

struct Pass {
  const Line* read[kMost];
  Line* written[kMost];
  bool past_caches;
};

#if defined(__AVX512F__)
void stream(Line* p, Line v) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), reinterpret_cast<__m512i>(v));
}
void end_stream() { _mm_sfence(); }
#elif defined(__AVX__)
void stream(Line* p, Line v) {
  const __m256i* const halves = reinterpret_cast<const __m256i*>(&v);
  for (int half = 0; half < 2; ++half)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p) + half, halves[half]);
}
void end_stream() { _mm_sfence(); }
#else
void stream(Line* p, Line v) { *p = v; }
void end_stream() {}
#endif

template <int kRead, int kWritten>
void over(int64_t begin, int64_t end, void* context) {
  const Pass pass = *static_cast<const Pass*>(context);
  Line sum = {};
  for (int64_t i = begin; i < end; ++i) {
    Line v = pass.read[0][i];
    for (int k = 1; k < kRead; ++k) v ^= pass.read[k][i];
    for (int k = 0; k < kWritten; ++k) {
      if (pass.past_caches)
        stream(pass.written[k] + i, v);
      else
        pass.written[k][i] = v;
    }
    if (kWritten == 0) sum ^= v;
  }
  const Line used = sum;
  asm volatile("" : : "m"(used));  // else nothing would be read
  end_stream();
}

template <int kRead>
void run(int written, int64_t lines, Pass& pass) {
  constexpr int64_t kGrain = 1 << 11;  // 128 KiB
  constexpr ParallelFunc kBodies[] = {over<kRead, 0>, over<kRead, 1>, over<kRead, 2>};
  torch_parallel_for(0, lines, kGrain, kBodies[written], &pass);
}

}  // namespace

extern "C" void run_pass(int read, int written, int64_t lines, Pass* pass) {
  if (read == 1) return run<1>(written, lines, *pass);
  if (read == 2) return run<2>(written, lines, *pass);
  run<3>(written, lines, *pass);
}

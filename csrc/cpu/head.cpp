// What follows a network's last convolution: the mean of every channel's pixels, and a fully connected layer.
#include "isa.h"
#include "passes.h"
#include "pieces.h"

namespace fusedres::FUSEDRES_ISA {
namespace {

constexpr int64_t kLanes = Vec<float>::kLanes;

// body(first, lanes) for every vector of [0, count).
template <class Body>
FUSEDRES_INLINE void along(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) body(i, AllLanes{});
  if (i < count) body(i, FirstLanes{static_cast<int>(count - i)});
}

// Runs of pixels are added up first, as many as are in one, so that no sum is long.
template <class T, class Y>
void mean_of(const Mean& op) {
  int64_t length = 1;
  while (length * length < op.pixels) ++length;
  const int64_t channels = op.channels, pixels = op.pixels, vectors = ceil_div(channels, kLanes);
  const Vec<float> count = broadcast(static_cast<float>(pixels));
  parallel(op.images * vectors, pixels * kLanes, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / vectors, channel = i % vectors * kLanes;
      const T* const x = static_cast<const T*>(op.x) + image * pixels * channels + channel;
      auto add_up = [&](auto lanes) FUSEDRES_INLINE_LAMBDA {
        Vec<float> sum{};
        for (int64_t first = 0; first < pixels; first += length) {
          Vec<float> run{};
          for (int64_t pixel = first; pixel < minimum(first + length, pixels); ++pixel)
            run = run + load(x + pixel * channels, lanes);
          sum = sum + run;
        }
        store(static_cast<Y*>(op.y) + image * channels + channel, sum / count, lanes);
      };
      if (channel + kLanes <= channels)
        add_up(AllLanes{});
      else
        add_up(FirstLanes{static_cast<int>(channels - channel)});
    }
  });
}

constexpr int64_t kImages = 4, kOutputs = 4;  // at a time

// sums[i][o] = x[i] * weight[o] over inputs. A sum's bits don't depend on the others.
template <int kCount, class T>
FUSEDRES_INLINE void multiply(const float* const* x, const T* const* weight, int64_t inputs,
                              float (&sums)[kImages][kOutputs]) {
  Vec<float> sum[kCount][kOutputs] = {};
  along(inputs, [&](int64_t k, auto lanes) FUSEDRES_INLINE_LAMBDA {
    Vec<float> w[kOutputs];
#pragma GCC unroll 4
    for (int o = 0; o < kOutputs; ++o) w[o] = load(weight[o] + k, lanes);
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) {
      const Vec<float> value = load(x[i] + k, lanes);
#pragma GCC unroll 4
      for (int o = 0; o < kOutputs; ++o) sum[i][o] = multiply_add(value, w[o], sum[i][o]);
    }
  });
  for (int i = 0; i < kCount; ++i)
    for (int o = 0; o < kOutputs; ++o) sums[i][o] = static_cast<float>(sum_lanes(sum[i][o]));
}

// Where there are fewer images or outputs, the last one takes their places.
template <class T>
void connect_of(const Connect& op) {
  const int64_t inputs = op.inputs, outputs = op.outputs;
  for_each_piece(ceil_div(outputs, kLanes), op.images * kLanes * inputs, [&](int64_t piece) {
    const int64_t first = piece * kLanes;
    const FirstLanes lanes{static_cast<int>(minimum<int64_t>(kLanes, outputs - first))};
    for (int64_t image = 0; image < op.images; image += kImages) {
      const int64_t images = minimum(kImages, op.images - image);
      const float* x[kImages];
      for (int64_t i = 0; i < kImages; ++i) x[i] = op.x + (image + minimum(i, images - 1)) * inputs;
      float y[kImages][kLanes];
      for (int64_t o = 0; o < kLanes; o += kOutputs) {
        const T* weight[kOutputs];
        for (int64_t k = 0; k < kOutputs; ++k)
          weight[k] = static_cast<const T*>(op.weight) + minimum(first + o + k, outputs - 1) * inputs;
        float sums[kImages][kOutputs];
        if (images == 1)
          multiply<1>(x, weight, inputs, sums);
        else
          multiply<kImages>(x, weight, inputs, sums);
        for (int64_t i = 0; i < images; ++i) __builtin_memcpy(y[i] + o, sums[i], sizeof sums[i]);
      }
      for (int64_t i = 0; i < images; ++i) {
        Vec<float> z = load(y[i], AllLanes{});
        if (op.bias) z = z + load(op.bias + first, lanes);
        store(static_cast<T*>(op.y) + (image + i) * outputs + first, z, lanes);
      }
    }
  });
}

}  // namespace

// y = the mean of x's pixels, of bfloat16 in bfloat16 or float32.
void mean(const Mean& op) {
#if !defined(__AVX512BF16__)
  if (op.dtype == DType::kFloat32) return mean_of<float, float>(op);
#endif
  if (op.y_dtype == DType::kFloat32) return mean_of<BFloat16, float>(op);
  mean_of<BFloat16, BFloat16>(op);
}

// y = x weight^T + bias, x in float32 and the others rounded to bfloat16, sums in float32.
void connect(const Connect& op) { connect_of<BFloat16>(op); }

}  // namespace fusedres::FUSEDRES_ISA

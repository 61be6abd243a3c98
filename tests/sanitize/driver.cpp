// Calls every kernel of every variant that this machine runs, with random operands, on arrays of exactly the
// size that it may touch. Compiled with sanitizers: they find what lies beyond.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <initializer_list>
#include <random>
#include <thread>
#include <vector>

#include "cpu/conv_weights.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace fusedres {

int64_t thread_count() { return 3; }

// Up to so many threads with a share each.
void parallel_for(int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
  const int64_t share = std::max(grain, (count + thread_count() - 1) / thread_count());
  std::vector<std::thread> threads;
  for (int64_t begin = 0; begin < count; begin += share)
    threads.emplace_back(body, context, begin, std::min(begin + share, count));
  for (auto& thread : threads) thread.join();
}

namespace {

std::mt19937 generator{0};

int64_t draw(int64_t below) { return static_cast<int64_t>(generator() % static_cast<uint64_t>(below)); }

template <class T>
T pick(std::initializer_list<T> choices) {
  return choices.begin()[draw(static_cast<int64_t>(choices.size()))];
}

DType accumulation(DType dtype) { return dtype == DType::kFloat64 ? dtype : DType::kFloat32; }

// One value of magnitude 1 to 2, or rarely NaN.
void write_value(DType dtype, unsigned char* to) {
  const uint32_t bits = static_cast<uint32_t>(generator());
  float value = bits % 997 ? 1 + static_cast<float>(bits & 0xffff) / 0x10000 : std::nanf("");
  if (bits >> 31) value = -value;
  uint32_t word;
  std::memcpy(&word, &value, sizeof word);
  const double wide = value;
  const auto bfloat16 = static_cast<uint16_t>(word >> 16);
  const auto half = static_cast<uint16_t>(
      std::isnan(value) ? 0x7e00 : (word >> 16 & 0x8000) | 0x3c00 | (word >> 13 & 0x3ff));
  switch (dtype) {
    case DType::kFloat32:
      return static_cast<void>(std::memcpy(to, &value, sizeof value));
    case DType::kFloat64:
      return static_cast<void>(std::memcpy(to, &wide, sizeof wide));
    case DType::kBFloat16:
      return static_cast<void>(std::memcpy(to, &bfloat16, sizeof bfloat16));
    case DType::kFloat16:
      return static_cast<void>(std::memcpy(to, &half, sizeof half));
  }
}

// The arrays of one call, each in an allocation of its own that ends where the array does.
class Arrays {
 public:
  void* empty(int64_t count, DType dtype) {
    return allocate(count * size_of(dtype), draw(2) * size_of(dtype));
  }
  // As torch's are: packed weights hold float32 beside bfloat16.
  void* aligned(int64_t bytes) { return allocate(bytes, 0); }
  uint8_t* bytes(int64_t count) { return static_cast<uint8_t*>(allocate(count, draw(2))); }
  void* filled(int64_t count, DType dtype) {
    auto* const p = static_cast<unsigned char*>(empty(count, dtype));
    for (int64_t i = 0; i < count; ++i) write_value(dtype, p + i * size_of(dtype));
    return p;
  }
  void* maybe(int64_t count, DType dtype) { return draw(2) ? filled(count, dtype) : nullptr; }
  void* maybe_empty(int64_t count, DType dtype) { return draw(4) ? empty(count, dtype) : nullptr; }

 private:
  void* allocate(int64_t bytes, int64_t skew) {
    blocks_.emplace_back(static_cast<size_t>(bytes + skew), 0xff);
    return blocks_.back().data() + skew;
  }

  std::deque<std::vector<unsigned char>> blocks_;
};

struct Sizes {
  int64_t images, channels, height, width;
};

// One random call of each kernel.
class Round {
 public:
  Round(const Variant& variant, DType dtype) : variant_(variant), dtype_(dtype) {
    const Sizes sizes = pick<Sizes>({{1, 1, 1, 1},
                                     {2, 3, 5, 7},
                                     {3, 35, 9, 4},
                                     {2, 64, 7, 7},
                                     {70, 24, 1, 1},
                                     {1, 600, 3, 3},
                                     {4, 5, 2, 530},
                                     {3, 8, 64, 64},
                                     {16, 16, 17, 16}});
    shape_ = {sizes.images, sizes.channels, sizes.height * sizes.width,
              pick({Order::kPlanes, Order::kPixels})};
    pool_ = {axis(sizes.height), axis(sizes.width)};
    act_ = static_cast<int>(draw(8));
  }

  void affine_act() {
    const AffineOperand x = affine(true), r = affine(draw(2));
    const Gate gate = draw_gate();
    uint8_t* const mask = draw_mask(r.data);
    void* const y = elements(true);
    variant_.affine_act_forward({shape_, dtype_, act_, x, r, gate, y, mask});
    variant_.affine_act_backward({shape_, dtype_, act_, elements(false), y, mask, x, r, gate,
                                  gradients(r.data, r.scale || r.bias || r.mean, gate)});
  }

  void bn_act() {
    const NormOperand x = norm(true, pick({Statistics::kBatch, Statistics::kRunning, Statistics::kAbsent}));
    const bool has_r = draw(2);
    const NormOperand r =
        norm(has_r, has_r ? pick({Statistics::kBatch, Statistics::kAbsent}) : Statistics::kAbsent);
    const Gate gate = draw_gate();
    uint8_t* const mask = draw_mask(r.data);
    void* const y = elements(true);
    variant_.bn_act_forward({shape_, dtype_, act_, x, r, gate, y, mask});
    variant_.bn_act_backward(
        {shape_, dtype_, act_, elements(false), y, mask, x, r, gate, gradients(r.data, r.stats, gate)});
  }

  void bn_act_pool() {
    const NormOperand x = norm(true, pick({Statistics::kBatch, Statistics::kRunning}));
    const int64_t windows = shape_.images * shape_.channels * pool_.rows.outputs * pool_.columns.outputs;
    uint8_t* const choice = arrays_.bytes(windows);
    const int act = static_cast<int>(draw(2));
    variant_.bn_act_pool_forward({shape_, dtype_, act, x, pool_, arrays_.empty(windows, dtype_), choice});
    Gradients to = gradients(false, false, Gate{});
    variant_.bn_act_pool_backward({shape_, dtype_, arrays_.filled(windows, dtype_), choice, x, pool_, to});
  }

  void max_pool() {
    Shape shape = shape_;
    shape.order = Order::kPixels;
    const int64_t windows = shape.images * shape.channels * pool_.rows.outputs * pool_.columns.outputs;
    variant_.max_pool(
        {shape, dtype_, arrays_.filled(shape.elements(), dtype_), pool_, arrays_.empty(windows, dtype_)});
  }

  void head() {
    const DType y_dtype = pick({dtype_, DType::kFloat32});
    const int64_t images = shape_.images, channels = shape_.channels, outputs = 1 + draw(40);
    variant_.mean({images, shape_.pixels, channels, dtype_, y_dtype,
                   arrays_.filled(shape_.elements(), dtype_), arrays_.empty(images * channels, y_dtype)});
    variant_.connect({images, channels, outputs,
                      static_cast<float*>(arrays_.filled(images * channels, DType::kFloat32)),
                      arrays_.filled(outputs * channels, DType::kBFloat16),
                      static_cast<float*>(arrays_.maybe(outputs, DType::kFloat32)),
                      arrays_.empty(images * outputs, DType::kBFloat16)});
  }

  void conv_act() {
    const int64_t tile = pick<int64_t>({1, 1, 2, 4, 7}), images = 1 + draw(3);
    const ConvAxis rows = window(tile), columns = window(tile);
    const int64_t groups = tile > 1 ? 1 : pick<int64_t>({1, 1, 3, 9});
    const bool few = groups > 1 && draw(2);
    const int64_t of_group = few ? pick<int64_t>({2, 4, 8}) : pick<int64_t>({1, 3, 16, 21, 1024});
    const ConvWeights weights =
        ConvWeights::of(dtype_, groups, of_group, few ? of_group : pick<int64_t>({1, 7, 16, 33, 70}),
                        rows.kernel, columns.kernel, tile);
    const int64_t inputs = groups * weights.inputs, outputs = weights.groups * weights.outputs;
    const int64_t filter = weights.inputs * rows.kernel * columns.kernel,
                  bytes = weights.elements() * size_of(dtype_);
    const PlainWeight weight{arrays_.filled(outputs * filter, dtype_),
                             dtype_,
                             {filter, rows.kernel * columns.kernel, columns.kernel, 1}};
    void* const packed = arrays_.aligned(bytes);
    conv_pack(weights, weight.begin, weight.strides, packed, bytes);
    const bool fresh = tile > 1 && draw(2);
    ConvSpread spread{{rows.outputs, columns.outputs}, {1, 1}};
    const bool is_spread = tile == 1 && draw(2);
    for (int axis = 0; is_spread && axis < 2; ++axis) {
      spread.step[axis] = 1 + draw(3);
      spread.size[axis] = (spread.size[axis] - 1) * spread.step[axis] + 1;
    }
    void* const y = arrays_.filled(images * spread.size[0] * spread.size[1] * outputs, dtype_);
    const void* const x = arrays_.filled(images * rows.size * columns.size * inputs, dtype_);
    const auto* const bias = static_cast<const float*>(arrays_.maybe(outputs, DType::kFloat32));
    variant_.conv_act({images, inputs, outputs, groups, tile, rows, columns, dtype_, act_, x,
                       fresh ? nullptr : packed, bias, draw(2) ? y : nullptr, y, nullptr, weight,
                       is_spread ? spread : ConvSpread{}});
  }

  void conv_repack() {
    const int64_t inputs = pick<int64_t>({1, 3, 16, 21, 600}), outputs = pick<int64_t>({1, 7, 16, 33, 70});
    const int64_t tile = dtype_ == DType::kBFloat16 ? pick<int64_t>({1, 2, 4, 7}) : pick<int64_t>({1, 2, 4});
    const int64_t rows = tile > 1 ? 3 : 1 + draw(4), columns = tile > 1 ? 3 : 1 + draw(4);
    // As the weight lies, turned round, and with its channels exchanged.
    const int64_t sign = draw(2) ? 1 : -1, window = rows * columns;
    const bool exchanged = draw(2);
    const DType from = draw(2) ? dtype_ : DType::kFloat32;
    const char* const begin = static_cast<const char*>(arrays_.filled(outputs * window * inputs, from));
    const int64_t channels = exchanged ? outputs : inputs, last = sign > 0 ? 0 : (window - 1) * channels;
    const PlainWeight weight{begin + last * size_of(from),
                             from,
                             {exchanged ? 1 : window * inputs, exchanged ? window * outputs : 1,
                              sign * columns * channels, sign * channels}};
    const ConvWeights shape{dtype_, 1, inputs, outputs, rows, columns, tile};
    variant_.conv_repack(
        {inputs, outputs, rows, columns, tile, dtype_, weight, arrays_.empty(shape.elements(), dtype_)});
  }

  void conv_dweight() {
    const bool bfloat16 = dtype_ == DType::kBFloat16;
    const int64_t tile = bfloat16 ? pick<int64_t>({1, 1, 2, 4, 7}) : pick<int64_t>({1, 2, 4});
    const int64_t images = draw(4), inputs = pick<int64_t>({1, 3, 16, 21, 600}),
                  outputs = pick<int64_t>({1, 7, 16, 33, 140});
    const ConvAxis rows = window(tile), columns = window(tile);
    auto* const dweight =
        static_cast<float*>(arrays_.empty(outputs * rows.kernel * columns.kernel * inputs, DType::kFloat32));
    variant_.conv_dweight({images, inputs, outputs, tile, rows, columns, dtype_,
                           arrays_.filled(images * rows.size * columns.size * inputs, dtype_),
                           arrays_.filled(images * rows.outputs * columns.outputs * outputs, dtype_), dweight,
                           1 + draw(3)});
  }

 private:
  // Winograd's tiles are of 3x3 windows, next to each other.
  static ConvAxis window(int64_t tile) {
    const int64_t kernel = tile > 1 ? 3 : 1 + draw(4), stride = tile > 1 ? 1 : 1 + draw(3);
    const int64_t dilation = tile > 1 ? 1 : 1 + draw(2), padding = draw(kernel + 1);
    const int64_t extent = dilation * (kernel - 1) + 1,
                  size = std::max<int64_t>(1, extent - 2 * padding) + draw(16);
    return {size, (size + 2 * padding - extent) / stride + 1, kernel, stride, padding, dilation};
  }

  static PoolAxis axis(int64_t size) {
    const int64_t kernel = 1 + draw(5), stride = 1 + draw(3);
    const int64_t padding = std::max<int64_t>(draw(kernel / 2 + 1), (kernel - size + 1) / 2);
    return {size, (size + 2 * padding - kernel) / stride + 1, kernel, stride, padding};
  }

  void* elements(bool empty) {
    return empty ? arrays_.empty(shape_.elements(), dtype_) : arrays_.filled(shape_.elements(), dtype_);
  }
  void* per_channel() { return arrays_.filled(shape_.channels, accumulation(dtype_)); }
  void* maybe_per_channel() { return arrays_.maybe(shape_.channels, accumulation(dtype_)); }

  AffineOperand affine(bool present) {
    if (!present) return {};
    return {elements(false), maybe_per_channel(), maybe_per_channel(), maybe_per_channel()};
  }

  NormOperand norm(bool present, Statistics source) {
    if (!present) return {};
    if (source == Statistics::kAbsent)
      return {elements(false), nullptr, nullptr, nullptr, nullptr, nullptr, source, 0, 0};
    void* const stats = arrays_.empty(3 * shape_.channels, accumulation(dtype_));
    return {elements(false),
            maybe_per_channel(),
            maybe_per_channel(),
            per_channel(),
            per_channel(),
            stats,
            source,
            0.1,
            1e-5};
  }

  Gate draw_gate() {
    if (draw(2)) return {};
    const bool images = draw(2), channels = draw(2);
    const int64_t count = (images ? shape_.images : 1) * (channels ? shape_.channels : 1);
    const DType dtype = pick({dtype_, DType::kFloat32});
    return {arrays_.filled(count, dtype), dtype, images ? (channels ? shape_.channels : 1) : 0, channels};
  }

  // A mask is kept for ReLU with a residual.
  uint8_t* draw_mask(const void* r) {
    if (act_ != 1 || !r) return nullptr;
    const int64_t rows = shape_.order == Order::kPixels ? shape_.rows() : shape_.images * shape_.channels;
    return arrays_.bytes(rows * shape_.mask_row_bytes());
  }

  // What is absent is not asked for.
  Gradients gradients(bool r, bool r_constants, const Gate& gate) {
    const DType wide = accumulation(dtype_);
    auto channels = [&](bool wanted) {
      return wanted ? arrays_.maybe_empty(shape_.channels, wide) : nullptr;
    };
    const int64_t gate_count =
        (gate.image_stride ? shape_.images : 1) * (gate.channel_stride ? shape_.channels : 1);
    return {elements(true),
            channels(true),
            channels(true),
            r ? elements(true) : nullptr,
            channels(r_constants),
            channels(r_constants),
            gate.data ? arrays_.maybe_empty(gate_count, wide) : nullptr};
  }

  const Variant& variant_;
  const DType dtype_;
  Shape shape_;
  Pool pool_;
  int act_;
  Arrays arrays_;
};

}  // namespace
}  // namespace fusedres

int main(int, char** arguments) {
  using namespace fusedres;
  const int rounds = std::atoi(arguments[1]);
  const Variants all = variants();
  for (int i = 0; i < all.count; ++i) {
    const Variant& variant = all.all[i];
    if (!variant.supported()) continue;
    for (DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
      if (!variant.serves(dtype)) continue;
      for (int round = 0; round < rounds; ++round) {
        Round calls(variant, dtype);
        calls.affine_act();
        calls.bn_act();
        calls.bn_act_pool();
        calls.max_pool();
        if (dtype == DType::kFloat64 || dtype == DType::kFloat16) continue;
        calls.head();
        calls.conv_act();
        calls.conv_dweight();
        if (variant.conv_repack) calls.conv_repack();
      }
    }
    std::printf("%s: %d rounds of every data type\n", variant.name, rounds);
  }
}

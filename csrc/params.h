// What a kernel of an op is told: plain pointers and sizes, no torch types.
//
// A is the accumulation type: double for double data, float for everything else. C channels, S pixels an
// image.
#pragma once

#include <cstdint>

#include "hostdevice.h"

namespace fusedres {

enum class DType { kFloat32, kFloat64, kBFloat16, kFloat16 };

constexpr int64_t size_of(DType dtype) {
  if (dtype == DType::kFloat64) return 8;
  return dtype == DType::kFloat32 ? 4 : 2;
}

// How (N, C, S) lies in memory: whole planes, (N, C, S), or whole pixels, (N, S, C).
enum class Order { kPlanes, kPixels };

enum class Statistics { kAbsent = 0, kBatch = 1, kRunning = 2 };

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

struct Shape {
  int64_t images;
  int64_t channels;
  int64_t pixels;
  Order order;

  FUSEDRES_HOST_DEVICE int64_t elements() const { return images * channels * pixels; }
  FUSEDRES_HOST_DEVICE int64_t rows() const { return images * pixels; }
  FUSEDRES_HOST_DEVICE int64_t mask_row_bytes() const {
    return ((order == Order::kPixels ? channels : pixels) + 7) / 8;
  }
};

// Max-pool windows along one dimension; what of a window lies beyond the border is cut off.
struct PoolAxis {
  int64_t size;     // of x
  int64_t outputs;  // of y
  int64_t kernel;
  int64_t stride;
  int64_t padding;

  struct Range {
    int64_t begin;
    int64_t end;
  };
  // Where window o begins; negative in the padding.
  int64_t start(int64_t o) const { return o * stride - padding; }
  // What of window o lies inside x.
  Range inside(int64_t o) const {
    const int64_t begin = start(o), end = begin + kernel;
    return {begin < 0 ? 0 : begin, end < size ? end : size};
  }
  // The windows that cover some of x's places [begin, end).
  Range covering(int64_t begin, int64_t end) const {
    const int64_t before = begin + padding - kernel, last = (end - 1 + padding) / stride;
    return {before < 0 ? 0 : before / stride + 1, last < outputs ? last + 1 : outputs};
  }
};

struct Pool {
  PoolAxis rows;
  PoolAxis columns;
};

// In place of a position in a window: the activation is flat at its largest value.
constexpr int kPassesNothing = 255;

// k in k * A_x(x), of shape (1 or N, 1 or C); a stride is 0 along what is broadcast.
struct Gate {
  const void* data;  // null: no gate
  DType dtype;       // x's, or float
  int64_t image_stride;
  int64_t channel_stride;
};

// t -> (t - mean) * scale + bias
struct AffineOperand {
  const void* data;   // (N, C, S) T; null: there is none, or the backward does not need its value
  const void* scale;  // (C,) A, null: 1
  const void* bias;   // (C,) A, null: 0
  const void* mean;   // (C,) A, null: 0
};

// t -> (t - mean) * rstd * weight + bias
struct NormOperand {
  const void* data;    // (N, C, S) T; null: there is none, or the backward does not need its value
  const void* weight;  // (C,) A, null: 1
  const void* bias;    // (C,) A, null: 0
  void* running_mean;  // (C,) A, or null; the forward's only
  void* running_var;   // (C,) A, or null; the forward's only
  void* stats;         // (3, C) A: the mean's high part, its remainder, rstd; null if `source` is kAbsent
  Statistics source;
  double momentum;
  double eps;
};

struct Gradients {
  void* dx;         // (N, C, S) T; a null gradient is not wanted
  void* dweight;    // (C,) A
  void* dbias;      // (C,) A
  void* dr;         // (N, C, S) T
  void* dweight_r;  // (C,) A
  void* dbias_r;    // (C,) A
  void* dgate;      // A, the gate's shape
};

// y = act(k * A_x(x) + A_r(r))
struct AffineActForward {
  Shape shape;
  DType dtype;
  int act;
  AffineOperand x;
  AffineOperand r;
  Gate gate;
  void* y;        // (N, C, S) T
  uint8_t* mask;  // one bit an element in y's order, every row on a byte of its own; null: not kept
};

struct AffineActBackward {
  Shape shape;
  DType dtype;
  int act;
  const void* dy;       // (N, C, S) T
  const void* y;        // (N, C, S) T, or null
  const uint8_t* mask;  // as the forward wrote it, or null
  AffineOperand x;
  AffineOperand r;
  Gate gate;
  Gradients gradients;
};

// y = act(k * BN_x(x) + BN_r(r))
struct BnActForward {
  Shape shape;
  DType dtype;
  int act;
  NormOperand x;
  NormOperand r;
  Gate gate;
  void* y;        // (N, C, S) T
  uint8_t* mask;  // one bit an element in y's order, every row on a byte of its own; null: not kept
};

struct BnActBackward {
  Shape shape;
  DType dtype;
  int act;
  const void* dy;       // (N, C, S) T
  const void* y;        // (N, C, S) T, or null
  const uint8_t* mask;  // as the forward wrote it, or null
  NormOperand x;
  NormOperand r;
  Gate gate;
  Gradients gradients;
};

// y = maxpool(act(BN(x))), act ReLU or the identity
struct BnActPoolForward {
  Shape shape;
  DType dtype;
  int act;
  NormOperand x;
  Pool pool;
  void* y;          // (N, C, S') T, S' windows
  uint8_t* choice;  // (N, C, S') the chosen position in the window, or kPassesNothing; null: not kept
};

struct BnActPoolBackward {
  Shape shape;
  DType dtype;
  const void* dy;         // (N, C, S') T
  const uint8_t* choice;  // as the forward wrote it
  NormOperand x;
  Pool pool;
  Gradients gradients;
};

// Windows of a convolution along one dimension; what of a window lies beyond the border reads as 0.
struct ConvAxis {
  int64_t size;     // of x
  int64_t outputs;  // of y
  int64_t kernel;
  int64_t stride;
  int64_t padding;
  int64_t dilation;

  // Where value k of window o lies in x.
  int64_t place(int64_t o, int64_t k) const { return o * stride - padding + k * dilation; }
  bool inside(int64_t place) const { return 0 <= place && place < size; }
};

// A weight as it lies; T, or float32, of which T's values are the roundings.
struct PlainWeight {
  const void* begin = nullptr;
  DType dtype = DType::kFloat32;
  int64_t strides[4] = {};  // outputs, inputs, rows, columns; may be negative
};

// y = maxpool(x), in channels_last
struct MaxPool {
  Shape shape;  // of x
  DType dtype;
  const void* x;  // (N, S, C) T
  Pool pool;
  void* y;  // (N, S', C) T
};

// y = the mean of x's pixels
struct Mean {
  int64_t images;
  int64_t pixels;
  int64_t channels;
  DType dtype;    // float32 or bfloat16
  DType y_dtype;  // the same, or float32
  const void* x;  // (N, S, C) T
  void* y;        // (N, C)
};

// y = x weight^T + bias
struct Connect {
  int64_t images;
  int64_t inputs;
  int64_t outputs;
  const float* x;      // (N, I)
  const void* weight;  // (O, I) bfloat16
  const float* bias;   // (O,), or null
  void* y;             // (N, O) bfloat16
};

// Pixels that are every step-th row and column of a larger image.
struct ConvSpread {
  int64_t size[2] = {};  // of that image; 0: there is none
  int64_t step[2] = {};
};

// y = act(conv(x, weight) * scale + bias + residual), all in channels_last
struct ConvAct {
  int64_t images;
  int64_t inputs;   // channels of x
  int64_t outputs;  // channels of y
  int64_t groups;
  int64_t tile;  // the side of Winograd's tiles of y, 1: none; as the weights were packed
  ConvAxis rows;
  ConvAxis columns;
  DType dtype;  // float32 or bfloat16
  int act;
  const void* x;                 // (N, H, W, I) T
  const void* weights;           // T, packed: csrc/cpu/conv_weights.h; with a tile null: as `plain` has them
  const float* bias;             // (O,), or null
  const void* residual;          // (N, H', W', O) T, or null; may be y
  void* y;                       // (N, H', W', O) T
  const float* scale = nullptr;  // (O,), or null
  PlainWeight plain = {};
  ConvSpread spread = {};  // of y and the residual
};

// packed <- weight, as csrc/cpu/conv_weights.h says; one group
struct ConvRepack {
  int64_t inputs;
  int64_t outputs;
  int64_t rows;  // of a window
  int64_t columns;
  int64_t tile;
  DType dtype;  // float32 or bfloat16
  PlainWeight weight;
  void* packed;  // T
};

// dweight of conv(x, weight), one group, all in channels_last
struct ConvDweight {
  int64_t images;
  int64_t inputs;   // channels of x
  int64_t outputs;  // channels of dy
  int64_t tile;     // the side of Winograd's tiles of dy, 1: none
  ConvAxis rows;
  ConvAxis columns;
  DType dtype;      // float32, with a tile, or bfloat16
  const void* x;    // (N, H, W, I) T
  const void* dy;   // (N, H', W', O) T
  float* dweight;   // (O, rows, columns, I)
  int64_t threads;  // that share the work
};

}  // namespace fusedres

// The gate's gradient: dk = sum g * A_x(x) over what the gate is broadcast along, from each image's sums.
#pragma once

#include "backward.cuh"
#include "tile.cuh"

namespace fusedres::cuda {

template <class A>
struct GateGradient {
  const Sums<A>* sums;  // (N, padded channels)
  int64_t pitch;
  BackwardOperand<A> x;
  int images, channels;  // that one value of the gate is the sum over
  int all_images, all_channels;
  int lanes;    // threads of one value
  int per_row;  // values of the gate for an image
  int values;
  A* dgate;

  explicit GateGradient(const Backward<A>& op)
      : sums(op.partials), pitch(op.cut.padded_channels()), x(op.x), dgate(op.dgate) {
    all_images = static_cast<int>(op.cut.shape.images);
    all_channels = static_cast<int>(op.cut.shape.channels);
    images = op.gate.image_stride ? 1 : all_images;
    channels = op.gate.channel_stride ? 1 : all_channels;
    per_row = all_channels / channels;
    values = all_images / images * per_row;
    lanes = 1;
    while (lanes < kThreads && lanes < int64_t{images} * channels) lanes *= 2;
  }
};

template <class A>
__global__ void __launch_bounds__(kThreads) gate_gradient_kernel(const __grid_constant__ GateGradient<A> op) {
  A* const shared = shared_partials<A>();
  const int lane = thread() % op.lanes;
  const int64_t value = int64_t{blockIdx.x} * (kThreads / op.lanes) + thread() / op.lanes;
  A sum = 0;
  if (value < op.values) {
    const int first_image = static_cast<int>(value / op.per_row) * op.images;
    const int first_channel = static_cast<int>(value % op.per_row) * op.channels;
    const int64_t terms = int64_t{op.images} * op.channels;
    for (int64_t term = lane; term < terms; term += op.lanes) {
      const int image = first_image + static_cast<int>(term / op.channels);
      const int channel = first_channel + static_cast<int>(term % op.channels);
      const Sums<A> sums = op.sums[image * op.pitch + channel];
      const A scale = value_or<A>(op.x.rstd, channel, 1) * value_or<A>(op.x.weight, channel, 1);
      const A centred = fma(-value_or<A>(op.x.low, channel, 0), sums.gx, sums.gx_x);
      sum += fma(scale, centred, value_or<A>(op.x.bias, channel, 0) * sums.gx);
    }
  }
  shared[thread()] = sum;
  for (int half = op.lanes / 2; half > 0; half /= 2) {
    __syncthreads();
    if (lane < half) shared[thread()] += shared[thread() + half];
  }
  __syncthreads();
  if (value < op.values && lane == 0) op.dgate[value] = shared[thread()];
}

template <class A>
cudaError_t gate_gradient(const GateGradient<A>& op, const Context& context) {
  const int64_t blocks = ceil_div(op.values, kThreads / op.lanes);
  return launch(gate_gradient_kernel<A>, op, blocks, kThreads * sizeof(A), false, context);
}

}  // namespace fusedres::cuda

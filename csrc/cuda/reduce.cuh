// Partial results of a channel: of threads to those of a warp, a block, and at last of all parts, always in
// the same order.
#pragma once

#include "../welford.h"
#include "walk.cuh"

namespace fusedres::cuda {

// Moments of values that were shifted by `centre`.
template <class A>
struct Centred {
  A centre;
  Moments<A> moments;

  static FUSEDRES_DEVICE Centred none() { return {0, {0, 0, 0}}; }
};

template <class A>
FUSEDRES_DEVICE Centred<A> merge(const Centred<A>& a, const Centred<A>& b) {
  const A centre = a.moments.count > 0 ? a.centre : b.centre;
  return {centre, merge(a.moments, {b.moments.count, (b.centre - centre) + b.moments.mean, b.moments.m2})};
}

// With the partials of another lane, which has the same centres and one count for all its channels.
template <class A, int K>
FUSEDRES_DEVICE void merge_lane_xor(Centred<A> (&partials)[K], int mask) {
  const A own = partials[0].moments.count, other = from_lane_xor(own, mask);
#pragma unroll
  for (int k = 0; k < K; ++k) {
    Moments<A>& moments = partials[k].moments;
    moments = merge({own, moments.mean, moments.m2},
                    Moments<A>{other, from_lane_xor(moments.mean, mask), from_lane_xor(moments.m2, mask)});
  }
}

// Sums for the gradients of x's and r's parameters; gx = k * g.
template <class A>
struct Sums {
  A gx;
  A gx_x;  // of gx * (x - mean's high part)
  A g;
  A g_r;

  static FUSEDRES_DEVICE Sums none() { return {0, 0, 0, 0}; }
};

template <class A>
FUSEDRES_DEVICE Sums<A> merge(const Sums<A>& a, const Sums<A>& b) {
  return {a.gx + b.gx, a.gx_x + b.gx_x, a.g + b.g, a.g_r + b.g_r};
}

template <class A, int K>
FUSEDRES_DEVICE void merge_lane_xor(Sums<A> (&partials)[K], int mask) {
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const Sums<A>& own = partials[k];
    partials[k] = merge(own, {from_lane_xor(own.gx, mask), from_lane_xor(own.gx_x, mask),
                              from_lane_xor(own.g, mask), from_lane_xor(own.g_r, mask)});
  }
}

constexpr int kGroupChannels = 64;  // at most

// Shared memory for one reduction at a time.
template <class P>
constexpr size_t kReductionBytes =
    sizeof(P) * (kWarps * kGroupChannels > kThreads ? kWarps * kGroupChannels : kThreads);

// The thread's K channels' partials to the block's, one a channel of the group, into `to`.
template <class P, int K>
FUSEDRES_DEVICE void reduce_block(P (&partials)[K], int lanes, P* shared, P* to) {
  const int lane = thread() % kWarp, warp = thread() / kWarp, channels = lanes * K;
  for (int distance = lanes; distance < kWarp; distance *= 2) merge_lane_xor(partials, distance);
  if (lane < lanes)
#pragma unroll
    for (int k = 0; k < K; ++k) shared[warp * channels + lane * K + k] = partials[k];
  __syncthreads();
  for (int c = thread(); c < channels; c += kThreads) {
    P all = shared[c];
    for (int other = 1; other < kWarps; ++other) all = merge(all, shared[other * channels + c]);
    to[c] = all;
  }
  __syncthreads();
}

// The partials of all parts, `channels` of them a part, `pitch` apart: thread c < channels gets channel c's.
template <class P>
FUSEDRES_DEVICE P reduce_parts(const P* partials, int parts, int64_t pitch, int channels, P* shared) {
  const int channel = thread() % channels, pieces = kThreads / channels;
  P all = P::none();
  for (int part = thread() / channels; part < parts; part += pieces)
    all = merge(all, partials[part * pitch + channel]);
  shared[thread()] = all;
  for (int half = pieces / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread() < half * channels)
      shared[thread()] = merge(shared[thread()], shared[thread() + half * channels]);
  }
  __syncthreads();
  all = shared[channel];
  __syncthreads();
  return all;
}

}  // namespace fusedres::cuda

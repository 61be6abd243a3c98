// What forward and backward kernels share: packs in memory and on chip, constants of channels, gate and mask.
#pragma once

#include "activation.cuh"
#include "reduce.cuh"

namespace fusedres::cuda {

// Constants of the channels of a group.
template <class A>
struct Tables {
  A mean[kGroupChannels];
  A scale[kGroupChannels];
  A shift[kGroupChannels];
  A b[kGroupChannels];  // of the second pass of a backward: dt = scale * g + (b * (t - mean) + d)
  A d[kGroupChannels];
};

// Where a group's channel stands in a table. The first halves of all lanes' packs stand together: the 16
// bytes that neighbouring threads read then lie side by side.
template <class A>
FUSEDRES_DEVICE int table_index(int lanes, int lane, int k) {
  constexpr int kSide = 16 / static_cast<int>(sizeof(A));
  return k / kSide * kSide * lanes + lane * kSide + k % kSide;
}

// A thread's part of a table, one constant a channel of its packs.
template <int K, class A>
FUSEDRES_DEVICE void read_table(const A (&table)[kGroupChannels], int lanes, A (&to)[K]) {
#pragma unroll
  for (int k = 0; k < K; ++k)
    to[k] = table[K == 1 ? thread() % lanes : table_index<A>(lanes, thread() % lanes, k)];
}

// The thread's place in the tables for channel thread() of the group.
template <class A>
FUSEDRES_DEVICE int own_index(const Cut& cut, int K) {
  return K == 1 ? thread() : table_index<A>(cut.lanes, thread() / K, thread() % K);
}

// Shared memory: room for a reduction, constants of both operands, and the packs that stay on chip.
template <class A>
constexpr size_t kHeadBytes = kReductionBytes<Sums<A>> + 2 * sizeof(Tables<A>);

template <class P>
FUSEDRES_DEVICE P* shared_partials() {
  return reinterpret_cast<P*>(shared_memory());
}

template <class A>
FUSEDRES_DEVICE Tables<A>& shared_tables(int operand) {
  return reinterpret_cast<Tables<A>*>(shared_memory() + kReductionBytes<Sums<A>>)[operand];
}

template <class T, int V>
FUSEDRES_DEVICE Pack<T, V> load(const void* tensor, int64_t element) {
  return *reinterpret_cast<const Pack<T, V>*>(static_cast<const T*>(tensor) + element);
}

// Several at once, so that they are in flight together.
template <class T, int V, int kSteps>
FUSEDRES_DEVICE void load_steps(const void* tensor, const Place (&at)[kSteps], Pack<T, V> (&packs)[kSteps]) {
#pragma unroll
  for (int u = 0; u < kSteps; ++u) {
    packs[u] = {};
    if (at[u].active) packs[u] = load<T, V>(tensor, at[u].element);
  }
}

// The thread's packs of the first `resident` steps, of several tensors. No other thread touches them.
template <class T, int V>
class Stash {
 public:
  template <class A>
  static FUSEDRES_DEVICE Stash of(int resident) {
    return Stash(reinterpret_cast<Pack<T, V>*>(shared_memory() + kHeadBytes<A>), resident);
  }
  FUSEDRES_DEVICE bool holds(int step) const { return step < resident_; }
  FUSEDRES_DEVICE Pack<T, V>& at(int tensor, int step) const {
    return packs_[(tensor * resident_ + step) * kThreads + thread()];
  }

  // From here where the tensor, if it is not -1, is kept at these steps, else from memory.
  template <int kSteps>
  FUSEDRES_DEVICE void load_steps(const void* data, int tensor, int step, const Place (&at)[kSteps],
                                  Pack<T, V> (&packs)[kSteps]) const {
    if (tensor < 0 || !holds(step)) return cuda::load_steps(data, at, packs);
#pragma unroll
    for (int u = 0; u < kSteps; ++u) packs[u] = this->at(tensor, step + u);
  }

 private:
  FUSEDRES_DEVICE Stash(Pack<T, V>* packs, int resident) : packs_(packs), resident_(resident) {}
  Pack<T, V>* packs_;
  int resident_;
};

template <class T, int V>
FUSEDRES_DEVICE void store(void* tensor, const Place& at, const Pack<T, V>& pack) {
  if (at.active) *reinterpret_cast<Pack<T, V>*>(static_cast<T*>(tensor) + at.element) = pack;
}

template <class A>
FUSEDRES_DEVICE A value_or(const A* table, int64_t channel, A otherwise) {
  return table ? table[channel] : otherwise;
}

FUSEDRES_DEVICE double gate_value(const Gate& gate, int64_t image, int64_t channel) {
  const int64_t i = image * gate.image_stride + channel * gate.channel_stride;
  switch (gate.dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(gate.data)[i];
    case DType::kFloat64:
      return static_cast<const double*>(gate.data)[i];
    case DType::kBFloat16:
      return widen(static_cast<const BFloat16*>(gate.data)[i]);
    case DType::kFloat16:
      return widen(static_cast<const Half*>(gate.data)[i]);
  }
  return 1;
}

// The gate of each channel of a pack.
template <class A, int K, class W>
FUSEDRES_DEVICE void load_gate(const Gate& gate, const W& walk, const Place& at, A (&k)[K]) {
  const int64_t image = gate.image_stride ? walk.image(at) : 0;
#pragma unroll
  for (int i = 0; i < K; ++i)
    k[i] = at.active ? static_cast<A>(gate_value(gate, image, walk.channel() + i)) : A{1};
}

// The mask's bits of a pack, from or to the byte that several threads share. All threads of a warp take part.
template <int V, class W>
FUSEDRES_DEVICE unsigned load_bits(const uint8_t* mask, const W& walk, const Place& at) {
  return at.active ? mask[walk.mask_byte(at)] >> walk.mask_shift(at) : 0u;
}

template <class T, int V, class W>
FUSEDRES_DEVICE void store_mask(uint8_t* mask, const W& walk, const Place& at, const Pack<T, V>& y) {
  unsigned bits = 0;
#pragma unroll
  for (int v = 0; v < V; ++v) bits |= static_cast<unsigned>(!(y[v] <= 0)) << v;
  const int shift = walk.mask_shift(at);
  bits = at.active ? bits << shift : 0u;
#pragma unroll
  for (int distance = 1; distance < 8 / V; distance *= 2) bits |= from_lane_xor(bits, distance);
  if (at.active && shift == 0) mask[walk.mask_byte(at)] = static_cast<uint8_t>(bits);
}

// A thread's constants of t -> (t - mean) * scale + shift.
template <class A, int K>
struct Constants {
  A mean[K], scale[K], shift[K];

  FUSEDRES_DEVICE void read(const Tables<A>& tables, int lanes) {
    read_table<K>(tables.mean, lanes, mean);
    read_table<K>(tables.scale, lanes, scale);
    read_table<K>(tables.shift, lanes, shift);
  }
  FUSEDRES_DEVICE A apply(A t, int k) const { return affine(t, mean[k], scale[k], shift[k]); }
};

}  // namespace fusedres::cuda

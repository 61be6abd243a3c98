#include "forward.cuh"
#include "tile.cuh"

namespace fusedres::cuda {
namespace {

// kPlain: r as it is, no gate, an activation that is a select. kProjection: r has constants of its own. kAny:
// all.
enum class Kind { kPlain, kProjection, kAny };

// Packs in flight of each tensor; the more constants and code, the fewer registers are left for them.
template <Kind kKind>
constexpr int kUnroll = kKind == Kind::kPlain        ? 4
                        : kKind == Kind::kProjection ? 2
                                                     : 1;

// One operand's moments of a unit, its packs kept on chip.
template <class T, int V, Order kOrder>
FUSEDRES_DEVICE void reduce_operand(const Walk<V, kOrder>& walk, const void* data, int lanes,
                                    const Stash<T, V>& stash, int tensor, Centred<Accumulation<T>>* to) {
  using A = Accumulation<T>;
  constexpr int kSteps = kUnroll<Kind::kPlain>;
  // A value near those of the warp, so that squares of differences do not cancel: the mean of its first ones.
  A pivot[V];
  const Pack<T, V> first = load<T, V>(data, walk.near_first());
#pragma unroll
  for (int v = 0; v < V; ++v) pivot[v] = first[v] * static_cast<A>(lanes) / kWarp;
  for (int distance = lanes; distance < kWarp; distance *= 2)
#pragma unroll
    for (int v = 0; v < V; ++v) pivot[v] += from_lane_xor(pivot[v], distance);
#pragma unroll
  for (int v = 0; v < V; ++v)
    pivot[v] = pivot[v] - pivot[v] == 0 ? pivot[v] : 0;  // sums must see an infinity

  A count = 0, sum[V] = {}, squares[V] = {};
  for (int step = 0; step < walk.steps(); step += kSteps) {
    Place at[kSteps];
    Pack<T, V> packs[kSteps];
#pragma unroll
    for (int u = 0; u < kSteps; ++u) at[u] = walk.at(step + u);
    load_steps(data, at, packs);
#pragma unroll
    for (int u = 0; u < kSteps; ++u) {
      if (stash.holds(step + u)) stash.at(tensor, step + u) = packs[u];
      if (!at[u].active) continue;
      count += 1;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const A difference = packs[u][v] - pivot[v];
        sum[v] += difference;
        squares[v] += difference * difference;
      }
    }
  }

  Centred<A> partials[V];
  const A share = count > 0 ? 1 / count : 0;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const A mean = sum[v] * share;
    partials[v] = {pivot[v], {count, mean, squares[v] - sum[v] * mean}};
  }
  if constexpr (kOrder == Order::kPlanes) {
    Centred<A> channel[1] = {partials[0]};
#pragma unroll
    for (int v = 1; v < V; ++v) channel[0] = merge(channel[0], partials[v]);
    reduce_block(channel, lanes, shared_partials<Centred<A>>(), to);
  } else {
    reduce_block(partials, lanes, shared_partials<Centred<A>>(), to);
  }
}

// stats of a channel, from its mean = high + low and biased variance.
template <class A>
FUSEDRES_DEVICE void write_stats(const ForwardOperand<A>& operand, int64_t channels, int channel, A high,
                                 A low, A rstd) {
  operand.stats[channel] = high;
  operand.stats[channels + channel] = low;
  operand.stats[2 * channels + channel] = rstd;
}

template <class A>
FUSEDRES_DEVICE void move_running(A* running, int channel, A momentum, A now) {
  if (running) running[channel] = running[channel] * (1 - momentum) + now * momentum;
}

// The constants of a group's channels into shared memory; `writes`: stats and running statistics as well.
template <int K, class A>
FUSEDRES_DEVICE void finish_operand(const Forward<A>& op, const ForwardOperand<A>& operand, int index,
                                    int group, bool writes) {
  const int channels = op.cut.group_channels();
  const bool from_batch = operand.source == Statistics::kBatch;
  Moments<A> moments{};
  A centre = 0;
  if (from_batch) {
    const int64_t pitch = op.cut.padded_channels();
    const Centred<A>* const partials = op.partials + (index * op.cut.parts) * pitch + group * channels;
    const Centred<A> all =
        reduce_parts(partials, op.cut.parts, pitch, channels, shared_partials<Centred<A>>());
    centre = all.centre;
    moments = all.moments;
  }
  const int channel = group * channels + thread();
  if (thread() < channels && channel < op.cut.shape.channels) {
    const A* const given = operand.source == Statistics::kRunning ? operand.running_mean : operand.mean;
    A mean = from_batch ? centre + moments.mean : value_or<A>(given, channel, 0), low = 0, rstd = 1;
    // An infinite mean has no remainder.
    if (from_batch && mean - mean == 0) low = moments.mean - (mean - centre);
    if (operand.source != Statistics::kAbsent) {
      const A var = from_batch ? moments.m2 / moments.count : operand.running_var[channel];
      rstd = 1 / sqrt(var + operand.eps);
      if (writes) write_stats(operand, op.cut.shape.channels, channel, mean, low, rstd);
    }
    if (from_batch && writes) {
      move_running(operand.running_mean, channel, operand.momentum, mean);
      move_running(operand.running_var, channel, operand.momentum, moments.m2 / (moments.count - 1));
    }
    Tables<A>& tables = shared_tables<A>(index);
    const A scale = rstd * value_or<A>(operand.weight, channel, 1);
    const int at = own_index<A>(op.cut, K);
    tables.mean[at] = mean;
    tables.scale[at] = scale;
    // -0 for an absent bias: t + -0 is t for every t.
    tables.shift[at] = fma(-low, scale, value_or<A>(operand.bias, channel, A{-0.0}));
  }
  __syncthreads();
}

// The unit's y from its last step to its first: what was read last is still in the cache.
template <Kind kKind, class T, int V, Order kOrder>
FUSEDRES_DEVICE void apply_unit(const Forward<Accumulation<T>>& op, const Walk<V, kOrder>& walk,
                                const Stash<T, V>& stash, int tensor_x, int tensor_r) {
  using A = Accumulation<T>;
  constexpr int kSteps = kUnroll<kKind>;
  constexpr int K = kOrder == Order::kPixels ? V : 1;
  const int lanes = op.cut.lanes;
  const bool relu = op.act == Act::kRelu;
  Constants<A, K> x_constants, r_constants;
  if constexpr (kKind != Kind::kAny) x_constants.read(shared_tables<A>(0), lanes);

  for (int step = (walk.steps() - 1) / kSteps * kSteps; step >= 0; step -= kSteps) {
    Place at[kSteps];
    Pack<T, V> x[kSteps], r[kSteps];
#pragma unroll
    for (int u = 0; u < kSteps; ++u) at[u] = walk.at(step + u);
    stash.load_steps(op.x.data, tensor_x, step, at, x);
    if (op.r.data) stash.load_steps(op.r.data, kKind == Kind::kPlain ? -1 : tensor_r, step, at, r);
    // Registers can't hold them all beside the packs.
    if constexpr (kKind == Kind::kAny) x_constants.read(shared_tables<A>(0), lanes);
    if constexpr (kKind != Kind::kPlain) r_constants.read(shared_tables<A>(1), lanes);
#pragma unroll
    for (int u = 0; u < kSteps; ++u) {
      A k[K];
      if (kKind == Kind::kAny && op.gate.data) load_gate(op.gate, walk, at[u], k);
      A y[V];
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const int c = K == 1 ? 0 : v;
        A z = x_constants.apply(x[u][v], c);
        if constexpr (kKind == Kind::kAny)
          if (op.gate.data) z *= k[c];
        if (op.r.data) {
          A shortcut = r[u][v];
          if constexpr (kKind != Kind::kPlain) shortcut = r_constants.apply(shortcut, c);
          z += shortcut;
        }
        if constexpr (kKind == Kind::kAny)
          z = activate(op.act, z);
        else if (relu)
          z = Relu::value(Real<A>{z}).v;
        y[v] = z;
      }
      const auto rounded = Pack<T, V>::of(y);
      store(op.y, at[u], rounded);
      if (op.mask) store_mask(op.mask, walk, at[u], rounded);
    }
  }
}

template <Kind kKind, class T, int V, Order kOrder>
__global__ void __launch_bounds__(kThreads, 1)
    forward_kernel(const __grid_constant__ Forward<Accumulation<T>> op) {
  using A = Accumulation<T>;
  const Cut& cut = op.cut;
  const bool reduce_x = op.x.source == Statistics::kBatch, reduce_r = op.r.source == Statistics::kBatch;
  const int tensor_x = reduce_x ? 0 : -1, tensor_r = !reduce_r ? -1 : reduce_x ? 1 : 0;
  const int channels = cut.group_channels();
  const int64_t pitch = cut.padded_channels();
  const auto stash = Stash<T, V>::template of<A>(op.resident);
  const Share share(cut.units());
  constexpr int K = kOrder == Order::kPixels ? V : 1;
  int finished = -1;
  for (int i = share.begin; i < share.end; ++i) {
    const int unit = op.phases == Phases::kReduce ? i : share.begin + share.end - 1 - i;
    const int group = unit / cut.parts, part = unit % cut.parts;
    const Walk<V, kOrder> walk(cut, group, part);
    if (op.phases != Phases::kApply) {
      Centred<A>* const to = op.partials + part * pitch + group * channels;
#pragma unroll 1
      for (int o = 0; o < 2; ++o) {
        const ForwardOperand<A>& operand = o ? op.r : op.x;
        if (operand.source == Statistics::kBatch)
          reduce_operand(walk, operand.data, cut.lanes, stash, o ? tensor_r : tensor_x,
                         to + o * cut.parts * pitch);
      }
    }
    if (op.phases == Phases::kReduce) continue;
    // Where a group has parts, each block of a launch with both phases has one unit.
    if (op.phases == Phases::kBoth && cut.parts > 1) grid_barrier();
    if (group != finished || part == 0) {
#pragma unroll 1
      for (int o = 0; o < 2; ++o) finish_operand<K>(op, o ? op.r : op.x, o, group, part == 0);
      finished = group;
    }
    apply_unit<kKind>(op, walk, stash, tensor_x, tensor_r);
    __syncthreads();
  }
}

template <Kind kKind, class T, int V, Order kOrder>
cudaError_t launch_forward(const Forward<Accumulation<T>>& op, const Context& context) {
  using A = Accumulation<T>;
  const bool reduces_x = op.x.source == Statistics::kBatch, reduces_r = op.r.source == Statistics::kBatch;
  const Tile tile{V * sizeof(T), reduces_x + reduces_r, kUnroll<Kind::kPlain>, kHeadBytes<A>};
  const int reductions = reduces_r ? 2 : reduces_x;  // r's partials come after x's
  return in_phases(forward_kernel<kKind, T, V, kOrder>, op, &Forward<A>::partials, reductions, tile, context);
}

template <class T, int V, Order kOrder>
cudaError_t with_kind(const Forward<Accumulation<T>>& op, const Context& context) {
  if (op.gate.data || !is_select(op.act)) return launch_forward<Kind::kAny, T, V, kOrder>(op, context);
  if (!op.r.normalised()) return launch_forward<Kind::kPlain, T, V, kOrder>(op, context);
  // Single elements are not worth an instantiation.
  return launch_forward<V == 1 ? Kind::kAny : Kind::kProjection, T, V, kOrder>(op, context);
}

template <class T, int V>
cudaError_t with_order(Forward<Accumulation<T>> op, const Context& context) {
  const Shape shape = op.cut.shape;
  op.cut = cut_groups(shape, V);
  return shape.order == Order::kPixels ? with_kind<T, V, Order::kPixels>(op, context)
                                       : with_kind<T, V, Order::kPlanes>(op, context);
}

}  // namespace

template <class T>
cudaError_t forward(const Forward<Accumulation<T>>& op, const Context& context) {
  if (kWide<T> > 1 && fits_packs(op.cut.shape, kWide<T>, {op.x.data, op.r.data, op.y}))
    return with_order<T, kWide<T>>(op, context);
  return with_order<T, 1>(op, context);
}

template <class T>
cudaError_t forward_facts(const Device& device, CudaKernelFacts* facts) {
  const Tile tile{kWide<T> * sizeof(T), 1, kUnroll<Kind::kPlain>, kHeadBytes<Accumulation<T>>};
  return kernel_facts(forward_kernel<Kind::kPlain, T, kWide<T>, Order::kPixels>, device, tile, facts);
}

template cudaError_t forward<FUSEDRES_ELEMENT>(const Forward<Accumulation<FUSEDRES_ELEMENT>>& op,
                                               const Context& context);

template cudaError_t forward_facts<FUSEDRES_ELEMENT>(const Device& device, CudaKernelFacts* facts);

}  // namespace fusedres::cuda

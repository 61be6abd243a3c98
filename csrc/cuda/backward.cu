#include "backward.cuh"
#include "gate.cuh"
#include "tile.cuh"

namespace fusedres::cuda {
namespace {

// kPlain: r as it is, no gate, an activation that is a select. kProjection: r has constants of its own. kAny:
// all.
enum class Kind { kPlain, kProjection, kAny };

// Packs in flight of each tensor; the more constants and code, the fewer registers are left for them.
template <Kind kKind>
constexpr int kUnroll = kKind == Kind::kPlain ? 2 : 1;

// The forward's constants of a group's channels into shared memory.
template <int K, class A>
FUSEDRES_DEVICE void begin_operand(const Cut& cut, const BackwardOperand<A>& operand, int index, int group) {
  const int channels = cut.group_channels(), channel = group * channels + thread();
  if (thread() < channels && channel < cut.shape.channels) {
    Tables<A>& tables = shared_tables<A>(index);
    const int at = own_index<A>(cut, K);
    const A scale = value_or<A>(operand.rstd, channel, 1) * value_or<A>(operand.weight, channel, 1);
    tables.mean[at] = value_or<A>(operand.mean, channel, 0);
    tables.scale[at] = scale;
    tables.shift[at] =
        fma(-value_or<A>(operand.low, channel, 0), scale, value_or<A>(operand.bias, channel, A{-0.0}));
  }
}

// The parameters' gradients, and the constants of the second phase, from one operand's sums of g and g * (t -
// mean).
template <int K, class A>
FUSEDRES_DEVICE void finish_operand(const Cut& cut, const BackwardOperand<A>& operand, int index, int group,
                                    A sum_g, A sum_g_t, bool writes) {
  const int channels = cut.group_channels(), channel = group * channels + thread();
  if (thread() < channels && channel < cut.shape.channels) {
    Tables<A>& tables = shared_tables<A>(index);
    const int at = own_index<A>(cut, K);
    const A low = value_or<A>(operand.low, channel, 0), rstd = value_or<A>(operand.rstd, channel, 1);
    const A weight_gradient = fma(-low, sum_g, sum_g_t) * rstd;
    if (writes && operand.dweight) operand.dweight[channel] = weight_gradient;
    if (writes && operand.dbias) operand.dbias[channel] = sum_g;
    const A share = -tables.scale[at] / static_cast<A>(cut.shape.rows());
    const A b = share * rstd * weight_gradient;
    tables.b[at] = b;
    tables.d[at] = fma(-b, low, share * sum_g);
  }
}

// What a thread holds of some steps of a walk.
template <class T, int V, int kSteps>
struct Steps {
  Place at[kSteps];
  Pack<T, V> dy[kSteps];
  Pack<T, V> y[kSteps];
  Pack<T, V> x[kSteps];
  Pack<T, V> r[kSteps];
};

// Where the slope is a select, g is exact in T, and stays on chip in dy's place.
template <Kind kKind, class A>
FUSEDRES_DEVICE bool selects(const Backward<A>& op) {
  return kKind != Kind::kAny || op.mask || is_select(op.act);
}

// g = dy * act'(z) of one pack.
template <Kind kKind, class T, int V, Order kOrder, int K, int kSteps>
FUSEDRES_DEVICE void find_g(const Backward<Accumulation<T>>& op, const Walk<V, kOrder>& walk,
                            const Steps<T, V, kSteps>& steps, int u, const Accumulation<T> (&k)[K],
                            Accumulation<T> (&g)[V]) {
  using A = Accumulation<T>;
  if (selects<kKind>(op)) {
    const unsigned bits = op.mask ? load_bits<V>(op.mask, walk, steps.at[u]) : 0;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      g[v] = steps.dy[u][v];
      if (op.mask)
        g[v] = bits >> v & 1 ? g[v] : 0;
      else if (op.act == Act::kRelu)
        g[v] = Relu::gradient(Real<A>{steps.y[u][v]}, Real<A>{g[v]}).v;
    }
  } else if constexpr (kKind == Kind::kAny) {
    A told[V];  // y, or z computed again
    if (op.y) {
#pragma unroll
      for (int v = 0; v < V; ++v) told[v] = steps.y[u][v];
    } else {
      Constants<A, K> constants;
      constants.read(shared_tables<A>(0), op.cut.lanes);
#pragma unroll
      for (int v = 0; v < V; ++v)
        told[v] = k[K == 1 ? 0 : v] * constants.apply(steps.x[u][v], K == 1 ? 0 : v);
      if (op.r.data) {
        constants.read(shared_tables<A>(1), op.cut.lanes);
#pragma unroll
        for (int v = 0; v < V; ++v) told[v] += constants.apply(steps.r[u][v], K == 1 ? 0 : v);
      }
    }
#pragma unroll
    for (int v = 0; v < V; ++v) g[v] = activation_gradient(op.act, told[v], A{steps.dy[u][v]});
  }
}

template <Kind kKind, class A, int K, int V, Order kOrder>
FUSEDRES_DEVICE void find_gate(const Backward<A>& op, const Walk<V, kOrder>& walk, const Place& at,
                               A (&k)[K]) {
#pragma unroll
  for (int i = 0; i < K; ++i) k[i] = 1;
  if (kKind == Kind::kAny && op.gate.data) load_gate(op.gate, walk, at, k);
}

// The unit's sums, and what the second phase needs kept on chip.
template <Kind kKind, class T, int V, Order kOrder>
FUSEDRES_DEVICE void reduce_unit(const Backward<Accumulation<T>>& op, const Walk<V, kOrder>& walk,
                                 const Stash<T, V>& stash, Sums<Accumulation<T>>* to) {
  using A = Accumulation<T>;
  constexpr int kSteps = kUnroll<kKind>;
  constexpr int K = kOrder == Order::kPixels ? V : 1;
  const bool sums_r = kKind != Kind::kPlain && op.sums_r,
             again = kKind == Kind::kAny && !selects<kKind>(op) && !op.y;
  A mean_x[K], mean_r[K];
  read_table<K>(shared_tables<A>(0).mean, op.cut.lanes, mean_x);
  read_table<K>(shared_tables<A>(1).mean, op.cut.lanes, mean_r);

  Sums<A> sums[V];
#pragma unroll
  for (int v = 0; v < V; ++v) sums[v] = Sums<A>::none();
  for (int step = 0; step < walk.steps(); step += kSteps) {
    Steps<T, V, kSteps> steps;
#pragma unroll
    for (int u = 0; u < kSteps; ++u) steps.at[u] = walk.at(step + u);
    load_steps(op.dy, steps.at, steps.dy);
    if (op.y) load_steps(op.y, steps.at, steps.y);
    if (op.sums_x || again) load_steps(op.x.data, steps.at, steps.x);
    if (sums_r || (again && op.r.data)) load_steps(op.r.data, steps.at, steps.r);
#pragma unroll
    for (int u = 0; u < kSteps; ++u) {
      A k[K], g[V];
      find_gate<kKind>(op, walk, steps.at[u], k);
      find_g<kKind>(op, walk, steps, u, k, g);
      if (stash.holds(step + u)) {
        stash.at(0, step + u) = selects<kKind>(op) ? Pack<T, V>::of(g) : steps.dy[u];
        if (op.tensor_x > 0) stash.at(op.tensor_x, step + u) = steps.x[u];
        if (kKind != Kind::kPlain && op.tensor_r > 0) stash.at(op.tensor_r, step + u) = steps.r[u];
      }
      if (!steps.at[u].active) continue;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const int c = K == 1 ? 0 : v;
        const A gx = kKind == Kind::kAny && !op.gate_sums ? k[c] * g[v] : g[v];
        sums[v].g += g[v];
        if (kKind == Kind::kAny) sums[v].gx += gx;
        if (op.sums_x) sums[v].gx_x += gx * (steps.x[u][v] - mean_x[c]);
        if (sums_r) sums[v].g_r += g[v] * (steps.r[u][v] - mean_r[c]);
      }
    }
  }
  if (kKind != Kind::kAny)
#pragma unroll
    for (int v = 0; v < V; ++v) sums[v].gx = sums[v].g;
  if constexpr (kOrder == Order::kPlanes) {
    Sums<A> channel[1] = {sums[0]};
#pragma unroll
    for (int v = 1; v < V; ++v) channel[0] = merge(channel[0], sums[v]);
    reduce_block(channel, op.cut.lanes, shared_partials<Sums<A>>(), to);
  } else {
    reduce_block(sums, op.cut.lanes, shared_partials<Sums<A>>(), to);
  }
}

// One operand's gradient of a pack.
template <class T, int V, int K>
FUSEDRES_DEVICE void write_gradient(const BackwardOperand<Accumulation<T>>& operand, int index, int lanes,
                                    const Place& at, const Accumulation<T> (&g)[V],
                                    const Accumulation<T> (&k)[K], const Pack<T, V>& values) {
  using A = Accumulation<T>;
  const Tables<A>& tables = shared_tables<A>(index);
  A a[K], gradient[V];
  read_table<K>(tables.scale, lanes, a);
#pragma unroll
  for (int v = 0; v < V; ++v) gradient[v] = a[K == 1 ? 0 : v] * (k[K == 1 ? 0 : v] * g[v]);
  if (operand.from_batch) {
    A mean[K], b[K], d[K];
    read_table<K>(tables.mean, lanes, mean);
    read_table<K>(tables.b, lanes, b);
    read_table<K>(tables.d, lanes, d);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int c = K == 1 ? 0 : v;
      gradient[v] += b[c] * (values[v] - mean[c]) + d[c];
    }
  }
  store(operand.gradient, at, Pack<T, V>::of(gradient));
}

// The unit's dx and dr from its last step to its first: what was read last is still in the cache.
template <Kind kKind, class T, int V, Order kOrder>
FUSEDRES_DEVICE void apply_unit(const Backward<Accumulation<T>>& op, const Walk<V, kOrder>& walk,
                                const Stash<T, V>& stash) {
  using A = Accumulation<T>;
  constexpr int kSteps = kUnroll<kKind>;
  constexpr int K = kOrder == Order::kPixels ? V : 1;
  const bool again = kKind == Kind::kAny && !selects<kKind>(op) && !op.y;
  const bool needs_x = again || (op.x.gradient && op.x.from_batch);
  const bool needs_r = (again && op.r.data) || (op.r.gradient && op.r.from_batch);
  A ones[K];
#pragma unroll
  for (int i = 0; i < K; ++i) ones[i] = 1;

  for (int step = (walk.steps() - 1) / kSteps * kSteps; step >= 0; step -= kSteps) {
    Steps<T, V, kSteps> steps;
    const bool held = stash.holds(step), has_g = held && selects<kKind>(op);
#pragma unroll
    for (int u = 0; u < kSteps; ++u) steps.at[u] = walk.at(step + u);
    stash.load_steps(op.dy, 0, step, steps.at, steps.dy);
    if (op.y && !has_g) load_steps(op.y, steps.at, steps.y);
    if (needs_x) stash.load_steps(op.x.data, op.tensor_x, step, steps.at, steps.x);
    if (kKind != Kind::kPlain && needs_r) stash.load_steps(op.r.data, op.tensor_r, step, steps.at, steps.r);
#pragma unroll
    for (int u = 0; u < kSteps; ++u) {
      A k[K], g[V];
      find_gate<kKind>(op, walk, steps.at[u], k);
      if (has_g) {
#pragma unroll
        for (int v = 0; v < V; ++v) g[v] = steps.dy[u][v];
      } else {
        find_g<kKind>(op, walk, steps, u, k, g);
      }
      if (op.x.gradient) write_gradient(op.x, 0, op.cut.lanes, steps.at[u], g, k, steps.x[u]);
      if (!op.r.gradient) continue;
      if constexpr (kKind == Kind::kPlain)
        store(op.r.gradient, steps.at[u], Pack<T, V>::of(g));
      else
        write_gradient(op.r, 1, op.cut.lanes, steps.at[u], g, ones, steps.r[u]);
    }
  }
}

template <Kind kKind, class T, int V, Order kOrder>
__global__ void __launch_bounds__(kThreads, 1)
    backward_kernel(const __grid_constant__ Backward<Accumulation<T>> op) {
  using A = Accumulation<T>;
  constexpr int K = kOrder == Order::kPixels ? V : 1;
  const Cut& cut = op.cut;
  const int channels = cut.group_channels();
  const int64_t pitch = cut.padded_channels();
  const auto stash = Stash<T, V>::template of<A>(op.resident);
  const Share share(cut.units());
  int begun = -1, finished = -1;
  for (int i = share.begin; i < share.end; ++i) {
    const int unit = op.phases == Phases::kReduce ? i : share.begin + share.end - 1 - i;
    const int group = unit / cut.parts, part = unit % cut.parts;
    const Walk<V, kOrder> walk(cut, group, part);
    if (group != begun) {
      begin_operand<K>(cut, op.x, 0, group);
      begin_operand<K>(cut, op.r, 1, group);
      __syncthreads();
      begun = group;
    }
    if (op.phases != Phases::kApply)
      reduce_unit<kKind>(op, walk, stash, op.partials + part * pitch + group * channels);
    if (op.phases == Phases::kReduce) continue;
    // Where a group has parts, each block of a launch with both phases has one unit.
    if (op.phases == Phases::kBoth && cut.parts > 1) grid_barrier();
    if (op.partials && (group != finished || part == 0)) {
      const Sums<A> sums = reduce_parts(op.partials + group * channels, cut.parts, pitch, channels,
                                        shared_partials<Sums<A>>());
      finish_operand<K>(cut, op.x, 0, group, sums.gx, sums.gx_x, part == 0);
      finish_operand<K>(cut, op.r, 1, group, sums.g, sums.g_r, part == 0);
      finished = group;
      __syncthreads();
    }
    if (op.x.gradient || op.r.gradient) apply_unit<kKind>(op, walk, stash);
    __syncthreads();
  }
}

// The gate's gradient, from sums over every image of its own.
template <class A, class Kernel>
cudaError_t launch_gate(Kernel kernel, Backward<A> op, const Tile& tile, const Context& context) {
  Device device;
  if (const cudaError_t error = Device::current(&device)) return error;
  op.cut = cut_images(op.cut);
  op.gate_sums = op.sums_x = true;
  const size_t count = static_cast<size_t>(op.cut.parts * op.cut.padded_channels());
  op.partials = static_cast<Sums<A>*>(context.allocate(context.owner, count * sizeof(Sums<A>)));
  if (const cudaError_t error = launch_pass(kernel, op, Phases::kReduce, device, tile, context)) return error;
  return gate_gradient(GateGradient<A>(op), context);
}

template <Kind kKind, class T, int V, Order kOrder>
cudaError_t launch_backward(Backward<Accumulation<T>> op, const Context& context) {
  using A = Accumulation<T>;
  const auto kernel = backward_kernel<kKind, T, V, kOrder>;
  const bool again = !op.mask && !from_output(op.act);
  const bool keeps_x = again || (op.x.gradient && op.x.from_batch);
  const bool keeps_r = (again && op.r.data) || (op.r.gradient && op.r.from_batch);
  op.tensor_x = keeps_x ? 1 : -1;
  op.tensor_r = keeps_r ? 1 + keeps_x : -1;
  const Tile tile{V * sizeof(T), 1 + keeps_x + keeps_r, kUnroll<kKind>, kHeadBytes<A>};
  if (op.dgate) {
    if (const cudaError_t error = launch_gate(kernel, op, tile, context)) return error;
  }
  op.sums_x = op.x.dweight || (op.x.gradient && op.x.from_batch);
  op.sums_r = op.r.dweight || (op.r.gradient && op.r.from_batch);
  const bool reduces = op.sums_x || op.sums_r || op.x.dbias || op.r.dbias;
  if (!reduces && !op.x.gradient && !op.r.gradient) return cudaSuccess;
  return in_phases(kernel, op, &Backward<A>::partials, reduces, tile, context);
}

template <class T, int V, Order kOrder>
cudaError_t with_kind(const Backward<Accumulation<T>>& op, const Context& context) {
  const bool selects = op.mask || is_select(op.act);
  if (op.gate.data || !selects) return launch_backward<Kind::kAny, T, V, kOrder>(op, context);
  if (!op.r.normalised()) return launch_backward<Kind::kPlain, T, V, kOrder>(op, context);
  // Single elements are not worth an instantiation.
  return launch_backward<V == 1 ? Kind::kAny : Kind::kProjection, T, V, kOrder>(op, context);
}

template <class T, int V>
cudaError_t with_order(Backward<Accumulation<T>> op, const Context& context) {
  const Shape shape = op.cut.shape;
  op.cut = cut_groups(shape, V);
  return shape.order == Order::kPixels ? with_kind<T, V, Order::kPixels>(op, context)
                                       : with_kind<T, V, Order::kPlanes>(op, context);
}

}  // namespace

template <class T>
cudaError_t backward(const Backward<Accumulation<T>>& op, const Context& context) {
  const auto tensors = {op.dy,
                        op.y,
                        op.x.data,
                        op.r.data,
                        static_cast<const void*>(op.x.gradient),
                        static_cast<const void*>(op.r.gradient)};
  if (kWide<T> > 1 && fits_packs(op.cut.shape, kWide<T>, tensors))
    return with_order<T, kWide<T>>(op, context);
  return with_order<T, 1>(op, context);
}

template <class T>
cudaError_t backward_facts(const Device& device, CudaKernelFacts* facts) {
  const Tile tile{kWide<T> * sizeof(T), 2, kUnroll<Kind::kPlain>, kHeadBytes<Accumulation<T>>};
  return kernel_facts(backward_kernel<Kind::kPlain, T, kWide<T>, Order::kPixels>, device, tile, facts);
}

template cudaError_t backward<FUSEDRES_ELEMENT>(const Backward<Accumulation<FUSEDRES_ELEMENT>>& op,
                                                const Context& context);

template cudaError_t backward_facts<FUSEDRES_ELEMENT>(const Device& device, CudaKernelFacts* facts);

}  // namespace fusedres::cuda

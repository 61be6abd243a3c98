#include "isa.h"
#include "passes.h"

namespace fusedres::FUSEDRES_ISA {
namespace {

// The largest of some values, or a NaN that was among them, kept apart so that no comparison waits for it.
template <class A>
struct Largest {
  Vec<A> value = broadcast(-static_cast<A>(__builtin_inf()));
  Vec<A> nan{};

  FUSEDRES_INLINE void take(Vec<A> v) {
    value = select(v > value, v, value);
    nan = select(v != v, v, nan);
  }
  FUSEDRES_INLINE Vec<A> found() const { return select(nan != nan, nan, value); }
};

// A window's place, and y's.
template <class T>
struct Window {
  const T* begin;
  int64_t rows, columns;  // of x, those beyond its border left out
  int64_t row, column;    // from one to the next, in elements
  T* y;

  // Channels [c, c + kVectors vectors).
  template <int kVectors, class Lanes>
  FUSEDRES_INLINE void pool(int64_t c, Lanes lanes) const {
    using A = Accumulation<T>;
    constexpr int64_t kLanes = Vec<A>::kLanes;
    Largest<A> largest[kVectors];
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j)
        for (int k = 0; k < kVectors; ++k)
          largest[k].take(load(begin + i * row + j * column + c + k * kLanes, lanes));
    for (int k = 0; k < kVectors; ++k) store(y + c + k * kLanes, largest[k].found(), lanes);
  }
};

template <class T>
void pool(const MaxPool& op) {
  constexpr int64_t kLanes = VecOf<T>::kLanes;
  constexpr int kVectors = kVectorInstructions ? 4 : 1;
  const PoolAxis rows = op.pool.rows, columns = op.pool.columns;
  const int64_t channels = op.shape.channels, row = columns.size * channels;
  parallel(op.shape.images * rows.outputs, rows.stride * row, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* const image = static_cast<const T*>(op.x) + i / rows.outputs * rows.size * row;
      const PoolAxis::Range h = rows.inside(i % rows.outputs);
      for (int64_t o = 0; o < columns.outputs; ++o) {
        const PoolAxis::Range w = columns.inside(o);
        const Window<T> window{image + h.begin * row + w.begin * channels,
                               h.end - h.begin,
                               w.end - w.begin,
                               row,
                               channels,
                               static_cast<T*>(op.y) + (i * columns.outputs + o) * channels};
        int64_t c = 0;
        for (; c + kVectors * kLanes <= channels; c += kVectors * kLanes)
          window.template pool<kVectors>(c, AllLanes{});
        for (; c + kLanes <= channels; c += kLanes) window.template pool<1>(c, AllLanes{});
        if (c < channels) window.template pool<1>(c, FirstLanes{static_cast<int>(channels - c)});
      }
    }
  });
}

}  // namespace

// y = the largest value of every window of x, in channels_last, and no positions. Reads x, writes y.
void max_pool(const MaxPool& op) {
  with_type(op.dtype, [&](auto element) { pool<decltype(element)>(op); });
}

}  // namespace fusedres::FUSEDRES_ISA

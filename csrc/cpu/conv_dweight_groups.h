// Sums over groups of runs, each in a dweight of its own: threads share nothing. In the end they are added up
// in the groups' order, so that the bits don't depend on the threads.
#pragma once

#include "walk.h"

namespace fusedres::FUSEDRES_ISA {

class Groups {
 public:
  static constexpr int64_t kMost = 16;

  // A power of two, which divides well between threads.
  static int64_t count_for(int64_t runs, int64_t size) {
    constexpr int64_t kBytes = int64_t{4} << 20;  // of all groups' sums
    int64_t count = 1;
    while (2 * count <= minimum(runs, kMost) && 2 * count * size * int64_t{sizeof(float)} <= kBytes)
      count *= 2;
    return count;
  }

  Groups(int64_t count, int64_t size, float* dweight, Arena& arena)
      : count_(count), size_(size), dweight_(dweight), others_(arena.take<float>((count - 1) * size)) {}

  float* at(int64_t group) const { return group ? others_ + (group - 1) * size_ : dweight_; }

  void add_up() const {
    constexpr int64_t kLanes = Vec<float>::kLanes;
    if (count_ == 1) return;
    parallel(ceil_div(size_, kLanes), count_ * kLanes, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * kLanes; i < minimum(end * kLanes, size_); i += kLanes)
        if (i + kLanes <= size_)
          add_up(i, AllLanes{});
        else
          add_up(i, FirstLanes{static_cast<int>(size_ - i)});
    });
  }

 private:
  template <class Lanes>
  FUSEDRES_INLINE void add_up(int64_t i, Lanes lanes) const {
    Vec<float> sum = load(dweight_ + i, lanes);
    for (int64_t group = 1; group < count_; ++group) sum = sum + load(at(group) + i, lanes);
    store(dweight_ + i, sum, lanes);
  }

  const int64_t count_, size_;
  float* const dweight_;
  float* const others_;  // (count - 1, size)
};

}  // namespace fusedres::FUSEDRES_ISA

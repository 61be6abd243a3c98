// The threads and the scratch memory that the kernels are given: torch's in the library, anything in a
// test driver.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fusedres {

// body(context, begin, end) over disjoint ranges that cover [0, count), none shorter than `grain` but the
// last.
void parallel_for(int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context);

// How many threads parallel_for works with here.
int64_t thread_count();

// Scratch of the calling thread, 64-byte aligned, valid until the Arena that gave it is gone; kept for the
// next one. One that is made while another is there goes before it.
class Arena {
 public:
  Arena();
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(take_bytes(static_cast<size_t>(count) * sizeof(T)));
  }

 private:
  static void* take_bytes(size_t bytes);

  const size_t blocks_;  // that were there before
  const size_t used_;
  const size_t live_;
};

}  // namespace fusedres

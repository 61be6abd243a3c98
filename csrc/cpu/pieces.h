// Work in pieces: a thread begins with a range of its own, and when that is done takes what is left of the
// others', so that none waits for one that is slowed down. For results that are the same whoever computes
// them.
#pragma once

#include <atomic>
#include <new>

#include "walk.h"

namespace fusedres::FUSEDRES_ISA {

// The pieces that are left.
class Pieces {
 public:
  Pieces(int64_t count, int64_t ranges, Arena& arena) : ranges_(arena.take<Range>(ranges)), count_(ranges) {
    for (int64_t i = 0; i < ranges; ++i)
      new (ranges_ + i) Range{{count * i / ranges}, count * (i + 1) / ranges};
  }

  // Piece by piece for one thread, which begins with a range.
  class Taker {
   public:
    Taker(const Pieces& pieces, int64_t range) : pieces_(pieces), range_(range) {}

    // -1: there is none left.
    int64_t next() {
      for (; tried_ < pieces_.count_; ++tried_, range_ = (range_ + 1) % pieces_.count_) {
        Range& range = pieces_.ranges_[range_];
        const int64_t piece = range.next.fetch_add(1, std::memory_order_relaxed);
        if (piece < range.end) return piece;
      }
      return -1;
    }

   private:
    const Pieces& pieces_;
    int64_t range_;
    int64_t tried_ = 0;
  };

 private:
  struct alignas(64) Range {  // a cache line each
    std::atomic<int64_t> next;
    int64_t end;
  };

  Range* const ranges_;
  const int64_t count_;
};

// body(pieces) in as many threads as pay, each of which works on all pieces.next() that it gets of `count`.
template <class Body>
void share_out(int64_t count, int64_t elements_each, const Body& body) {
  Arena arena;
  const Pieces pieces(count, minimum(count, thread_count()), arena);
  parallel(minimum(count, thread_count()), count * elements_each / thread_count(),
           [&](int64_t begin, int64_t) {
             Pieces::Taker taker(pieces, begin);
             body(taker);
           });
}

// body(piece) for each, likewise.
template <class Body>
void for_each_piece(int64_t count, int64_t elements_each, const Body& body) {
  share_out(count, elements_each, [&](Pieces::Taker& pieces) {
    for (int64_t piece = pieces.next(); piece >= 0; piece = pieces.next()) body(piece);
  });
}

}  // namespace fusedres::FUSEDRES_ISA

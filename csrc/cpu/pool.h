// How the passes of a max-pool go along a row of a plane.
#pragma once

#include "walk.h"

namespace fusedres::FUSEDRES_ISA {

// Columns of x that are gone through together: more than a window has, few enough for one run of float
// additions.
constexpr int64_t kSegment = 512;

// body(column, lanes) for every vector of columns [begin, end).
template <class A, class Body>
FUSEDRES_INLINE void along_row(int64_t begin, int64_t end, const Body& body) {
  constexpr int64_t kLanes = Vec<A>::kLanes;
  int64_t column = begin;
  for (; column + kLanes <= end; column += kLanes) body(column, AllLanes{});
  if (column < end) body(column, FirstLanes{static_cast<int>(end - column)});
}

}  // namespace fusedres::FUSEDRES_ISA

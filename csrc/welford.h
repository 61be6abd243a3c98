// Mean and variance of a set of values, merged from those of its parts (Chan, Golub, LeVeque 1979).
#pragma once

#include "hostdevice.h"

namespace fusedres {

template <class A>
struct Moments {
  A count;
  A mean;
  A m2;  // sum of (value - mean)^2
};

template <class A>
FUSEDRES_HOST_DEVICE Moments<A> merge(const Moments<A>& a, const Moments<A>& b) {
  const A count = a.count + b.count;
  const A delta = b.mean - a.mean;
  const A share = count > 0 ? b.count / count : 0;  // both may be empty
  // An infinite part makes the mean infinite, as it does in eager; through delta it would become NaN.
  const A mean = delta - delta == 0 ? a.mean + delta * share : a.mean + b.mean;
  return {count, mean, a.m2 + b.m2 + delta * delta * a.count * share};
}

}  // namespace fusedres

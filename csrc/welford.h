// Mean and variance of a set of values, merged from those of its parts (Chan, Golub, LeVeque 1979).
#pragma once

#include "hostdevice.h"

namespace fusedres {

struct Moments {
  double count;
  double mean;
  double m2;  // sum of (value - mean)^2
};

FUSEDRES_HOST_DEVICE Moments merge(const Moments& a, const Moments& b) {
  const double count = a.count + b.count;
  const double delta = b.mean - a.mean;
  const double share = b.count / count;
  // An infinite part makes the mean infinite, as it does in eager; through delta it would become NaN.
  const double mean = delta - delta == 0 ? a.mean + delta * share : a.mean + b.mean;
  return {count, mean, a.m2 + b.m2 + delta * delta * a.count * share};
}

}  // namespace fusedres

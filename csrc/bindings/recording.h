// Kernels' calls. A thread that records notes them, to be run later one after the other, and runs none.
#pragma once

#include "../params.h"

namespace fusedres {

void run(const ConvAct& op);
void run(const MaxPool& op);
void run(const Mean& op);

}  // namespace fusedres

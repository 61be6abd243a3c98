"""A sample of the shared cases on the CUDA kernels, small enough for compute-sanitizer: python sanitized_cases.py 40"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import fusedres
from fusedres import testing


def main() -> None:
    wanted = int(sys.argv[1])
    done = 0
    with fusedres.use_backend("cuda"):
        for case in testing.cases(1200, large=2):
            if case.layout in ("sliced", "permuted") or case.residual in ("other layout", "stride 0"):
                continue
            given = testing.operands(case, "cuda")
            y = testing.candidate(case, given)
            torch.autograd.grad(y, [given.x], given.dy)
            done += 1
            if done == wanted:
                break
    torch.cuda.synchronize()
    print(f"{done} cases")


if __name__ == "__main__":
    main()

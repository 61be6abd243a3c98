"""One step of bn_act with a residual on the CUDA kernels, for ncu to count: python traffic_case.py 64 512 7 7"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import fusedres
from fusedres.ops import Norm, bn_act


def main() -> None:
    shape = tuple(map(int, sys.argv[1:]))
    x, r, dy = (
        torch.randn(shape, device="cuda").bfloat16().contiguous(memory_format=torch.channels_last) for _ in range(3)
    )
    weight = torch.rand(shape[1], device="cuda")
    leaves = [t.requires_grad_() for t in (x, r, weight)]
    with fusedres.use_backend("cuda"):
        torch.autograd.grad(bn_act(x, Norm(weight, training=True), residual=r), leaves, dy)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()

"""Tuning whose kernels serve a norm on this GPU: every backend runs the same calls, and its times are kept."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

from fusedres import dispatch
from fusedres.backends import Affine, Norm, Request, Statistics, ranking
from fusedres.epilogue import RELU
from fusedres.ops import affine_act, bn_act
from fusedres.times import Times
from fusedres.tuning.kernels import Call, cache_bytes, shapes_at, time_ms

BATCHES = (256, 64, 32, 1)
SHAPES = tuple(shape for batch in BATCHES for shape in shapes_at(batch))


def rank(
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    *,
    dtypes: Sequence[torch.dtype] = (torch.bfloat16,),
    memory_format: torch.memory_format = torch.channels_last,
    device: torch.device | str = "cuda",
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Time every backend with kernels for this GPU on a block's end; returns the table's file.

    A size class has the sum of its shapes' times: bn_act's step in training, forward and backward, and affine_act's
    forward. From then on whoever was the fastest serves the class, if by a tenth; what is found for a class is kept
    before the next one is begun.

    Args:
        shapes: (N, C, H, W), those of ResNet-18 and -50 at a few batch sizes by default.
        progress: called with the classes done and the classes in all.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("tuning times its launches, which a CUDA graph's capture can't; tune before the capture")
    device, work = torch.device(device), defaultdict(list)
    for shape, dtype, training in product(shapes, dtypes, (True, False)):
        block_end = BlockEnd(shape, dtype, memory_format, device, training)
        work[block_end.entry()].append(block_end)
    path = ranking.table().path
    for done, (entry, block_ends) in enumerate(work.items(), 1):
        path = ranking.keep({entry: _times(block_ends)})
        dispatch.clear()
        if progress is not None:
            progress(done, len(work))
    return path


class BlockEnd(NamedTuple):
    """A norm with a residual: bn_act's step in training, or affine_act's forward."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    memory_format: torch.memory_format
    device: torch.device
    training: bool

    def entry(self) -> str:
        like = torch.empty(self.shape, dtype=self.dtype, device="meta", memory_format=self.memory_format)
        op, source = ("bn_act", Statistics.BATCH) if self.training else ("affine_act", Statistics.ABSENT)
        of_size = ranking.size_class("cuda", like.numel())
        request = Request(op, "cuda", self.dtype, dispatch.layout(like), RELU.name, source.value, size_class=of_size)
        return ranking.entry_of(request)

    def calls(self) -> list[Call]:
        """Equal ones over more buffers than the cache holds."""
        size = 3 * math.prod(self.shape) * self.dtype.itemsize
        return [self._call() for _ in range(max(2, math.ceil(4 * cache_bytes(self.device) / size)))]

    def _call(self) -> Call:
        x, r, dy = (torch.randn(self.shape, device=self.device) for _ in range(3))
        x, r, dy = (t.to(self.dtype, memory_format=self.memory_format) for t in (x, r, dy))
        wide = torch.promote_types(self.dtype, torch.float32)
        weight, bias = (torch.rand(self.shape[1], device=self.device, dtype=wide) for _ in range(2))
        if not self.training:
            return torch.no_grad()(lambda: affine_act(x, Affine(weight, bias), residual=r))
        leaves = [t.requires_grad_() for t in (x, r, weight, bias)]
        # Without running statistics: those that a network has must not move while it is tuned.
        norm = Norm(weight, bias, training=True)
        return lambda: torch.autograd.grad(bn_act(x, norm, residual=r), leaves, dy)


def _times(block_ends: Sequence[BlockEnd]) -> Times:
    """Milliseconds of all together, by backend; of one that does not serve them none."""
    found = {b.name: 0.0 for b in dispatch.candidates("bn_act") if "CUDA" in b.keys}
    for block_end in block_ends:
        calls = block_end.calls()
        for name in list(found):
            try:
                with dispatch.use_backend(name):
                    found[name] += time_ms(calls, block_end.device)
            except dispatch.Unserved:
                del found[name]
    return found

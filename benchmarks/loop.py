"""A plain loop that moves an op's bytes in as many passes: what a kernel of those passes could reach at best.

What it writes is allocated at every call, as an op's results are, and torch's threads share the work.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import lru_cache, reduce
from pathlib import Path

import torch
from torch import Tensor

from fusedres import build
from fusedres.bench.timing import samples_ms
from fusedres.build import Library
from fusedres.target import Source, Target

LOOP = Target(
    "loop", Path(__file__).parent, (Source("loop.cpp"),), flags=("-std=c++17", "-O3", "-march=native", "-Wno-psabi")
)
_LINE = 64
_MOST = 3  # loop.cpp's kMost

Passes = Sequence[tuple[int, int]]  # tensors read and written by each


class _Pass(ctypes.Structure):
    _fields_ = (
        ("read", ctypes.c_void_p * _MOST),
        ("written", ctypes.c_void_p * _MOST),
        ("past_caches", ctypes.c_bool),
    )


def loop(passes: Passes, count: int, dtype: torch.dtype) -> Callable[[], list[Tensor]]:
    """The loop over tensors of `count` elements, with the kind of store that is faster here.

    Each pass reads the first of its tensors and writes their exclusive or to all that it writes.
    """
    read = [torch.randn(count, dtype=dtype) for _ in range(max(reads for reads, _ in passes))]
    calls = [_call(passes, read, past_caches) for past_caches in (False, True)]
    expected = reduce(torch.bitwise_xor, (t.view(torch.int16) for t in read[: passes[-1][0]]))
    for call in calls:
        if not all(torch.equal(t.view(torch.int16), expected) for t in call()):
            raise AssertionError("not timed, the loop does not write what it should")
    return min(calls, key=lambda call: min(samples_ms(call, torch.device("cpu"), count=5, sample_ms=5.0)))


def _call(passes: Passes, read: list[Tensor], past_caches: bool) -> Callable[[], list[Tensor]]:
    run_pass = _library().run_pass
    lines = read[0].numel() * read[0].itemsize // _LINE
    addresses = (ctypes.c_void_p * _MOST)(*(t.data_ptr() for t in read))

    def call() -> list[Tensor]:
        written: list[Tensor] = []
        for reads, writes in passes:
            written = [torch.empty_like(read[0]) for _ in range(writes)]
            to = (ctypes.c_void_p * _MOST)(*(t.data_ptr() for t in written))
            run_pass(reads, writes, ctypes.c_int64(lines), ctypes.byref(_Pass(addresses, to, past_caches)))
        return written

    return call


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    found = build.library(LOOP)
    if not isinstance(found, Library):
        raise RuntimeError(f"there is no loop to compare with: {found.reason}")
    return ctypes.CDLL(str(found.path))

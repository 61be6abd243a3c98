"""Whose kernels serve a norm on a GPU where several can: those that were the fastest there, by size class.

`tune` takes the times and keeps them; without them, or where a rule is to choose, the dispatcher's order stands. What a
process has read of them holds until it ends, or tunes itself.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from functools import cache
from hashlib import sha256
from importlib import metadata
from pathlib import Path

import torch

from fusedres import times
from fusedres.backends import Request, Statistics
from fusedres.native_sources import CUDA
from fusedres.tables import Table
from fusedres.target import sources_digest
from fusedres.times import Times

# Of elements: from 1 to 256 MiB of 16-bit ones, where launches stop to count, and at last caches.
BOUNDS = tuple(1 << power for power in range(19, 28))

_FORMAT = 1
_read: dict[str, dict[str, Times]] = {}  # by device: what its file held when it was first asked for


def size_class(device: str, elements: int) -> int:
    """How many bounds a tensor's elements pass, from 1 on; 0 where nothing is ranked.

    By comparisons, on which torch.compile guards where sizes are symbolic.
    """
    if device != "cuda":
        return 0
    passed = 1
    for bound in BOUNDS:
        if elements > bound:
            passed += 1
    return passed


def fastest(request: Request, names: tuple[str, ...]) -> str | None:
    """Which of the backends the times name, the first one being the rule's; None where the rule is to choose."""
    return _fastest(entry_of(request), names) if request.size_class else None


def words(request: Request, chosen: str) -> str | None:
    """The times that choose for a request, those of the chosen one first."""
    found = _known(entry_of(request)) if request.size_class and times.are_used() else {}
    return times.words(chosen, found) if found else None


def entry_of(request: Request) -> str:
    """What times are kept under. By running statistics a norm is an affine map, and one pass."""
    op = request.op if request.statistics == Statistics.BATCH else "affine_act"
    return f"{op}/{request.dtype}/{request.layout}/{request.size_class}"


def keep(found: Mapping[str, Times]) -> Path:
    """Add times to the table of the current device; they choose from now on, once the dispatcher forgets."""
    path = table().add(found, times.positive)
    _read.pop(torch.cuda.get_device_name(), None)
    return path


def table() -> Table:
    """The file of the current device, of these kernels."""
    device = torch.cuda.get_device_name()
    triton = metadata.version("triton") if importlib.util.find_spec("triton") else "none"
    header = {"format": _FORMAT, "device": device, "torch": torch.__version__, "triton": triton, "kernels": _kernels()}
    remedy = "python -m fusedres tune measures them again"
    return Table(f"backends {device}", tuple(header.items()), "times of backends", remedy)


@cache
def _kernels() -> str:
    """The digest of what is compiled for a GPU."""
    digest = sha256(sources_digest(CUDA).encode())
    for path in sorted((Path(__file__).parent / "triton").glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _known(entry: str) -> Times:
    device = torch.cuda.get_device_name()
    if device not in _read:
        _read[device] = dict(table().load(times.positive))
    return _read[device].get(entry, {})


def _fastest(entry: str, names: tuple[str, ...]) -> str | None:
    return times.fastest(names, _known(entry)) if times.are_used() else None


# What torch.compiler.assume_constant_result does, which would import the whole of torch._dynamo.
_fastest._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]

"""The most that a device can do: bytes a second of a copy, FLOPs a second of a large matrix product."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from fusedres.bench.timing import samples_ms

# Larger than any cache that the device has, and large enough for its matrix units.
_COPIED_BYTES = {"cpu": 100_000_000, "cuda": 400_000_000}
_SIDE = {"cpu": 2048, "cuda": 8192}


@dataclass(frozen=True)
class Ceilings:
    """Measured on one device.

    Args:
        copy: bytes a second, read and written, of a copy from memory to memory.
        matmul: FLOPs a second of a square matrix product.
    """

    copy: float
    matmul: float


def measure(device: torch.device, dtype: torch.dtype, *, samples: int = 15) -> Ceilings:
    """Both ceilings, in a few seconds."""
    return Ceilings(copy_rate(device, samples=samples), matmul_rate(device, dtype, samples=samples))


def copy_rate(device: torch.device, *, samples: int = 15) -> float:
    count = _COPIED_BYTES[device.type] // 4
    source = torch.rand(count, device=device)
    target = torch.empty_like(source)
    return _rate(lambda: target.copy_(source), 2 * 4 * count, device, samples)


def matmul_rate(device: torch.device, dtype: torch.dtype, *, samples: int = 15) -> float:
    side = _SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return _rate(lambda: torch.mm(a, b, out=out), 2 * side**3, device, samples)


def _rate(call: Callable[[], object], amount: int, device: torch.device, samples: int) -> float:
    return amount / median(samples_ms(call, device, count=samples, sample_ms=20.0)) * 1e3

"""How a pass over a tensor is cut into programs: a small declared list, and a default by counting bytes in flight.

A memory at bandwidth B and latency L is busy only while B * L bytes are on their way (Little's law). A processor's
share of that must be covered by what its resident programs load before they first wait.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fusedres.backends.triton.view import View

LATENCY_S = 8e-7  # of a busy memory; an assumption, not a measurement


@dataclass(frozen=True)
class Config:
    """One way to cut a pass.

    Args:
        tile: elements that a program loads of each operand at a time.
        unroll: tiles that it loads before it waits (reductions), or handles in all (elementwise passes).
        warps: warps a program.
        programs: programs that a processor holds at a time; the registers of every form allow it.
    """

    tile: int
    unroll: int
    warps: int
    programs: int


@dataclass(frozen=True, eq=False)
class Pass:
    """A kernel that walks the whole tensor.

    Args:
        reduces: whether the loads of `unroll` tiles are on their way together.
        operands: tensors that every form of it reads.
        configs: from the fewest bytes in flight to the most.
        gathers: whether what it reads lies at a distance of its own for every pixel.
    """

    name: str
    reduces: bool
    operands: int
    configs: tuple[Config, ...]
    gathers: bool = False

    def bytes_in_flight(self, config: Config, itemsize: int) -> int:
        together = config.unroll if self.reduces else 1
        return config.programs * config.tile * together * itemsize * self.operands


STATISTICS = Pass("statistics", True, 1, (Config(1024, 1, 4, 5), Config(1024, 2, 4, 5), Config(1024, 4, 4, 5)))
APPLY = Pass("apply", False, 1, (Config(1024, 4, 4, 5), Config(2048, 4, 4, 4), Config(4096, 2, 4, 3)))
GRADIENT_SUMS = Pass("gradient_sums", True, 2, (Config(1024, 1, 4, 4), Config(1024, 2, 4, 4), Config(1024, 4, 4, 4)))
GRADIENT_APPLY = Pass("gradient_apply", False, 2, (Config(1024, 4, 4, 4), Config(2048, 4, 4, 4), Config(4096, 2, 8, 2)))
BLOCK_PASSES = (STATISTICS, APPLY, GRADIENT_SUMS, GRADIENT_APPLY)
# Of x alone, a stride of 2 gives every window 4 pixels of its own; dy and the choices are small beside it.
POOL_APPLY = Pass("pool_apply", False, 4, (Config(1024, 4, 4, 4), Config(1024, 2, 4, 5), Config(2048, 2, 8, 2)), True)
POOL_GRADIENT_SUMS = Pass("pool_gradient_sums", True, 1, (Config(1024, 1, 4, 4), Config(1024, 2, 4, 4)), True)
POOL_GRADIENT_APPLY = Pass("pool_gradient_apply", False, 1, (Config(1024, 4, 4, 4), Config(2048, 2, 8, 2)), True)
POOL_PASSES = (POOL_APPLY, POOL_GRADIENT_SUMS, POOL_GRADIENT_APPLY)
PASSES = BLOCK_PASSES + POOL_PASSES


@dataclass(frozen=True)
class Architecture:
    """The largest part of a compute capability, from its data sheet."""

    bytes_per_s: float
    processors: int
    shared_kib: int  # of a processor

    def bytes_wanted(self) -> float:
        """Bytes that each processor must have on their way."""
        return self.bytes_per_s * LATENCY_S / self.processors


ARCHITECTURES = {
    80: Architecture(2.04e12, 108, 164),  # A100 80 GB
    86: Architecture(1.01e12, 84, 100),  # RTX 3090 Ti
    89: Architecture(1.01e12, 128, 100),  # RTX 4090
    90: Architecture(4.80e12, 132, 228),  # H200
    100: Architecture(8.00e12, 148, 228),  # B200
    120: Architecture(1.79e12, 170, 100),  # RTX 5090
}


def architecture(capability: int) -> Architecture:
    """The newest known that is not newer."""
    return ARCHITECTURES[max((c for c in ARCHITECTURES if c <= capability), default=min(ARCHITECTURES))]


def default(kind: Pass, capability: int, itemsize: int) -> Config:
    """The first declared configuration with enough bytes in flight, else the one with most.

    >>> default(STATISTICS, 90, 2) in STATISTICS.configs
    True
    """
    wanted = architecture(capability).bytes_wanted()
    for config in kind.configs:
        if kind.bytes_in_flight(config, itemsize) >= wanted:
            return config
    return max(kind.configs, key=lambda config: kind.bytes_in_flight(config, itemsize))


def blocks(kind: Pass, config: Config, view: View, dtype: torch.dtype) -> tuple[int, int]:
    """Pixels and channels of a tile: 128 bytes of channels, or a plane's pixels, as far as there are so many.

    Both count in eights along memory, because a mask's bits are packed there.
    """
    tile = config.tile // _elements_cost(kind, view, dtype)
    if view.channels_last:
        block_c = min(_power_of_2(view.channels), 128 // dtype.itemsize)
        return min(tile // block_c, _power_of_2(view.pixels)), block_c
    block_p = min(_power_of_2(view.pixels), tile)
    return block_p, min(tile // block_p, _power_of_2(view.channels))


def _elements_cost(kind: Pass, view: View, dtype: torch.dtype) -> int:
    """How many times the registers of a 2-byte or 4-byte element in a row of whole vectors an element takes.

    Where rows are of odd lengths, or along a row pixels are gathered, each element has an address of its own.
    """
    if view.row_factor() * dtype.itemsize < 8 or (kind.gathers and not view.channels_last):
        return 4
    return 2 if dtype.itemsize == 8 else 1


def _power_of_2(size: int) -> int:
    """The power of 2 that holds `size`, 8 at least."""
    return max(8, 1 << (size - 1).bit_length())

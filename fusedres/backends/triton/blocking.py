"""How a matrix product is cut into tiles: a small declared list, and a default by counting.

Nothing here was measured. A tile must find room in a processor's shared memory, there should be one for every
processor, and the larger it is, the less is read again of both factors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from fusedres.backends.triton.configurations import architecture

DESCRIPTORS_FROM = 90  # the first capability with a tensor memory accelerator
GROUP = 8  # tiles below each other that are taken before their neighbours
_RESERVED_BYTES = 1024  # of shared memory, by every program


@dataclass(frozen=True)
class Blocks:
    """One way to cut.

    Args:
        m, n, k: pixels, output channels and, at a time, input channels of a tile.
        warps: warps a program.
        stages: loads of input channels that are on their way together.
        programs: programs that the registers of a processor allow where rows are aligned; its shared memory may allow
            fewer.
        descriptors: whether the tensor memory accelerator reads both factors.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    programs: int
    descriptors: bool = False

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k}{' by descriptors' if self.descriptors else ''}"

    def shared_bytes(self, itemsize: int) -> int:
        """At most: both factors of every stage, and a residual while its order in registers changes."""
        return (self.stages * (self.m + self.n) * self.k + self.m * self.n) * itemsize

    def resident(self, capability: int, itemsize: int) -> int:
        """Programs that a processor holds at a time; none where one does not fit."""
        room = architecture(capability).shared_kib * 1024
        return min(self.programs, room // (self.shared_bytes(itemsize) + _RESERVED_BYTES))

    def bytes_in_flight(self, capability: int, itemsize: int) -> int:
        """Of a processor, all but one stage being waited for."""
        each = (self.stages - 1) * (self.m + self.n) * self.k * itemsize
        return self.resident(capability, itemsize) * each


class Problem(NamedTuple):
    """A product's sizes.

    Args:
        m, n, k: pixels, output channels and input channels.
        described: whether descriptors can describe both factors.
    """

    m: int
    n: int
    k: int
    dtype: torch.dtype
    described: bool

    def tiles(self, blocks: Blocks) -> int:
        return -(-self.m // blocks.m) * -(-self.n // blocks.n)


@dataclass(frozen=True, eq=False)
class Product:
    """What is computed with one kind of multiplication, and the ways to cut it, the largest tiles first."""

    name: str
    configs: tuple[Blocks, ...]

    def entry(self, problem: Problem) -> str:
        """What a tuned configuration is for: the channels, the pixels to a power of 2."""
        m, n, k, dtype, described = problem
        reads = "descriptors" if described else "pointers"
        return f"{self.name}/{str(dtype).removeprefix('torch.')}/{reads}/{k}x{n}/{m.bit_length()}"


# By the tensor cores, in 16 bits.
HALF = Product(
    "conv_act",
    (
        Blocks(128, 128, 64, 8, 3, 1, True),
        Blocks(128, 128, 32, 8, 4, 1),
        Blocks(128, 64, 64, 4, 3, 2, True),
        Blocks(64, 64, 64, 4, 4, 3, True),
        Blocks(64, 64, 64, 4, 3, 3),
        Blocks(64, 32, 64, 4, 4, 4, True),
    ),
)
# By ordinary multiply-adds, as IEEE 754 rounds them.
SINGLE = Product("conv_act_float32", (Blocks(128, 64, 16, 8, 3, 2), Blocks(64, 32, 32, 4, 3, 3)))
PRODUCTS = (HALF, SINGLE)


def product_of(dtype: torch.dtype) -> Product:
    return SINGLE if dtype is torch.float32 else HALF


def possible(kind: Product, problem: Problem, capability: int) -> list[Blocks]:
    """The declared configurations that the device and the operands allow."""
    described = problem.described and capability >= DESCRIPTORS_FROM
    itemsize = problem.dtype.itemsize
    return [c for c in kind.configs if c.resident(capability, itemsize) and (described or not c.descriptors)]


def default(kind: Product, problem: Problem, capability: int, processors: int) -> Blocks:
    """The largest tiles that are no wider than y and of which every processor has one, else the smallest.

    >>> str(default(HALF, Problem(256 * 56 * 56, 64, 256, torch.bfloat16, True), 90, 132))
    '128x64x64 by descriptors'
    """
    found = possible(kind, problem, capability)
    for blocks in found:
        if blocks.n < 2 * problem.n and problem.tiles(blocks) >= processors:
            return blocks
    smallest = min(blocks.m * blocks.n for blocks in found)
    return next(blocks for blocks in found if blocks.m * blocks.n == smallest)

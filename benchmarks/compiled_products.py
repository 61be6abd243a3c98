"""What Triton's compiler makes of the 1x1 convolutions' kernel: a part of docs/compiled.md."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from _compiling import CAPABILITIES, Usage, compiling, machine_code, name_of, usage
from triton.backends.compiler import GPUTarget

from fusedres.backends import Filter, Geometry
from fusedres.backends.triton import launch
from fusedres.backends.triton.blocking import HALF, SINGLE, Blocks, Problem, default, product_of
from fusedres.backends.triton.configurations import ARCHITECTURES
from fusedres.backends.triton.convolution import CONVOLUTION
from fusedres.epilogue import RELU, Activation
from fusedres.tuning import products

BATCHES = (1, 32, 256)
MULTIPLY = {"wgmma": "HGMMA", "tcgen05": "UTCHMMA", "mma": "HMMA", "fma": "FFMA"}  # instructions' names by kind


@dataclass(frozen=True)
class Convolution:
    """A 1x1 convolution by what changes the kernel's code; it has a scale and a bias.

    Args:
        described: whether descriptors can describe x; else y's pixels are two steps apart in it.
        joins: whether a residual is added.
    """

    name: str
    described: bool
    inputs: int = 256
    outputs: int = 512
    side: int = 28
    joins: bool = True
    act: Activation = RELU


BY_POINTERS = [blocks for blocks in HALF.configs if not blocks.descriptors]
ROWS = Convolution("rows", True)
PIXELS = Convolution("strided", False)
SMALL = (  # Triton takes an integer that is 1 for a constant
    Convolution("odd channels", False, 35, 17, 3),
    Convolution("one channel", False, 1, 1, 2),
    Convolution("one pixel", True, 8, 1, 1, joins=False),
)


@dataclass(frozen=True)
class Row:
    """The kernel as one architecture launches it."""

    convolution: Convolution
    blocks: Blocks
    dtype: torch.dtype
    capability: int
    usage: Usage
    multiplies: tuple[str, ...]  # kinds of instructions
    asynchronous: int  # reads of 16 bytes or of a tile, straight into shared memory
    planned: int  # programs that a processor is meant to hold

    def resident(self) -> int:
        return self.usage.resident(self.blocks.warps, self.capability)


def defaults(capability: int, dtype: torch.dtype = torch.bfloat16) -> list[tuple[Convolution, Blocks]]:
    """How ResNet-50's convolutions are cut without tuning, each way once."""
    processors, kind, found = ARCHITECTURES[capability].processors, product_of(dtype), {}
    for images, shape in itertools.product(BATCHES, products.RESNET50):
        pixels = images * (shape.side // shape.stride) ** 2
        for described in (True, False):
            problem = Problem(pixels, shape.outputs, shape.inputs, dtype, described)
            blocks = default(kind, problem, capability, processors)
            found[ROWS if blocks.descriptors else PIXELS, blocks] = None
    return [*found]


def call(convolution: Convolution, dtype: torch.dtype) -> None:
    """On tensors without memory, which read as aligned."""
    stride = 1 if convolution.described else 2

    def tensor(channels: int, side: int) -> torch.Tensor:
        t = torch.empty(32, channels, side, side, dtype=dtype, device="meta")
        return t.contiguous(memory_format=torch.channels_last)

    inputs, outputs, side = convolution.inputs, convolution.outputs, convolution.side
    weight = torch.empty(outputs, inputs, 1, 1, dtype=dtype, device="meta")
    taps = Filter(weight, *(torch.empty(outputs, device="meta") for _ in range(2)))
    residual = tensor(outputs, side) if convolution.joins else None
    x = tensor(inputs, stride * (side - 1) + 1)
    CONVOLUTION.run(x, taps, residual, Geometry((stride, stride)), convolution.act, False)


def compiled(convolution: Convolution, dtype: torch.dtype, capability: int, blocks: Blocks) -> Row:
    """The kernel of a convolution that is cut so."""
    rows: list[Row] = []

    def found(kernel: Any, code: Any, warps: int) -> None:
        cubin = code.asm["cubin"]
        text, used = machine_code(cubin), replace(usage(cubin), shared_bytes=code.metadata.shared)
        kinds = tuple(kind for kind, name in MULTIPLY.items() if re.search(rf"\b{name}\b", text))
        asynchronous = len(re.findall(r"\bLDGSTS\S*\.128|\bUTMALDG", text))
        planned = blocks.resident(capability, dtype.itemsize)
        rows.append(Row(convolution, blocks, dtype, capability, used, kinds, asynchronous, planned))

    with compiling(GPUTarget("cuda", capability, 32), capability, found), launch.forced(product_of(dtype), blocks):
        call(convolution, dtype)
    (row,) = rows
    return row


def matrix() -> Iterator[tuple[Convolution, torch.dtype, int, Blocks]]:
    """What is compiled: every default everywhere in bf16, the other data types and what is small for sm_90."""
    for capability in CAPABILITIES:
        for convolution, blocks in defaults(capability):
            yield convolution, torch.bfloat16, capability, blocks
    yield ROWS, torch.float16, 90, HALF.configs[0]
    yield from ((PIXELS, torch.float32, 90, blocks) for blocks in SINGLE.configs)
    yield from ((convolution, torch.bfloat16, 90, BY_POINTERS[-1]) for convolution in SMALL)


def document() -> Iterator[str]:
    yield from ("", "## 1x1 convolutions", "")
    yield (
        "Every way in which ResNet-50's are cut without tuning, with scale, bias, residual and ReLU. Both factors are "
        "read straight into shared memory: by the tensor memory accelerator where a tile is read by descriptors, else "
        "16 bytes at a time. No rule names this kernel, which was not measured."
    )
    yield ""
    columns = "x", "dtype", "target", "tile", "warps", "registers", "spilled", "shared", "programs", "multiplies by"
    columns += "asynchronous reads", "128-bit loads", "128-bit stores"
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for row in itertools.starmap(compiled, matrix()):
        used, blocks = row.usage, row.blocks
        yield (
            f"| {row.convolution.name} | {name_of(row.dtype)} | sm_{row.capability} | {blocks} | {blocks.warps} | "
            f"{used.registers} | {used.spilled_bytes} | {used.shared_bytes} | {row.resident()} / {row.planned} | "
            f"{row.multiplies[0]} | {row.asynchronous} | {used.wide_loads} of {used.loads} | "
            f"{used.wide_stores} of {used.stores} |"
        )

"""Tuning the Triton kernel of 1x1 convolutions for this GPU: every way to cut one is timed, and the fastest is kept.

It runs only when it is called. Without it, the ways that counting suggests are used. Neither decides whether the kernel
is used at all: `optimize` times it, cut as this says, against cuDNN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

from fusedres.backends import Filter, Geometry
from fusedres.backends.triton.convolution import CONVOLUTION
from fusedres.epilogue import RELU
from fusedres.tuning import kernels
from fusedres.tuning.kernels import Call


class Pointwise(NamedTuple):
    """A 1x1 convolution: channels, the side of x's images, and the stride."""

    inputs: int
    outputs: int
    side: int
    stride: int = 1
    joins: bool = False  # whether a residual is added


# Of ResNet-50, in its order.
RESNET50 = (
    Pointwise(64, 64, 56),
    Pointwise(64, 256, 56),
    Pointwise(64, 256, 56, joins=True),
    Pointwise(256, 64, 56),
    Pointwise(256, 128, 56),
    Pointwise(128, 512, 28, joins=True),
    Pointwise(256, 512, 56, 2),
    Pointwise(512, 128, 28),
    Pointwise(512, 256, 28),
    Pointwise(256, 1024, 14, joins=True),
    Pointwise(512, 1024, 28, 2),
    Pointwise(1024, 256, 14),
    Pointwise(1024, 512, 14),
    Pointwise(512, 2048, 7, joins=True),
    Pointwise(1024, 2048, 14, 2),
    Pointwise(2048, 512, 7),
)


class Operands(NamedTuple):
    """What a call is given; buffers of its own."""

    x: torch.Tensor
    taps: Filter
    residual: torch.Tensor | None
    geometry: Geometry


def operands(shape: Pointwise, images: int, dtype: torch.dtype, device: torch.device) -> Operands:
    """Random ones, in channels_last, of sums of about 1."""

    def normal(channels: int, side: int) -> torch.Tensor:
        t = torch.randn(images, channels, side, side, device=device)
        return t.to(dtype, memory_format=torch.channels_last)

    inputs, outputs, side, stride, joins = shape
    weight = torch.randn(outputs, inputs, 1, 1, device=device) / math.sqrt(inputs)
    taps = Filter(weight.to(dtype), torch.randn(outputs, device=device).to(dtype))
    residual = normal(outputs, -(-side // stride)) if joins else None
    return Operands(normal(inputs, side), taps, residual, Geometry((stride, stride)))


def calls_of(
    shape: Pointwise, images: int, dtype: torch.dtype, device: torch.device, run: Callable[..., object]
) -> list[Call]:
    """Calls of a backend's `run` over more buffers than the cache holds."""
    read = images * shape.side**2 * shape.inputs * dtype.itemsize
    sets = min(64, max(2, math.ceil(4 * kernels.cache_bytes(device) / read)))
    found = (operands(shape, images, dtype, device) for _ in range(sets))
    return [partial(run, *given, RELU, False) for given in found]


def tune_products(
    shapes: Sequence[Pointwise] = RESNET50,
    *,
    images: int = kernels.BATCH,
    dtypes: Sequence[torch.dtype] = (torch.bfloat16,),
    device: torch.device | str = "cuda",
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Time every way to cut these convolutions that the device allows; returns the table's file.

    What is found for one is kept before the next is begun, and serves others of its channels and about its pixels.

    Args:
        progress: called with the convolutions done and the convolutions in all.
    """
    kernels.refuse_capture()
    from fusedres.backends.triton import conv_act, launch, tuned
    from fusedres.backends.triton.blocking import possible, product_of

    device = torch.device(device)
    facts = launch.device_of(device)
    work, path = [*product(shapes, dtypes)], tuned.path_of(facts.name)
    for done, (shape, dtype) in enumerate(work, 1):
        kind = product_of(dtype)
        pixels = images * (-(-shape.side // shape.stride)) ** 2
        problem = conv_act.problem_of(pixels, shape.outputs, shape.inputs, dtype, shape.stride == 1)
        calls, found = calls_of(shape, images, dtype, device, CONVOLUTION.run), {}
        for blocks in possible(kind, problem, facts.capability):
            with launch.forced(kind, blocks):
                found[blocks] = kernels.time_ms(calls, device)
        tuned.save(facts.name, {kind.entry(problem): min(found, key=found.__getitem__)})
        launch.forget_plans()
        if progress is not None:
            progress(done, len(work))
    return path

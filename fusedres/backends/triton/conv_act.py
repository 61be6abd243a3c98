"""conv_act on NVIDIA GPUs where it is a matrix product: one launch, of no more programs than the device holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
import triton.language as tl
from torch import Tensor
from torch.nn import functional
from triton.tools.tensor_descriptor import TensorDescriptor

from fusedres.backends import Filter, Geometry
from fusedres.backends.triton import launch
from fusedres.backends.triton.blocking import GROUP, Blocks, Problem, product_of
from fusedres.backends.triton.product import Pixels, Tiling, conv_act
from fusedres.epilogue import Activation

_ALIGNMENT = 16  # bytes, of what a descriptor describes and of its rows


def run(
    x: Tensor, taps: Filter, residual: Tensor | None, geometry: Geometry, act: Activation, in_place: bool
) -> Tensor:
    """y, written over the residual where that is allowed."""
    weight, bias, scale = taps
    images, inputs, height, width = x.shape
    if inputs != weight.shape[1] or x.dtype is not weight.dtype:
        # Nothing for the kernel: eager says what is wrong.
        return functional.conv2d(x, weight, None, *geometry)
    rows, columns = geometry.output_size((1, 1), height, width)
    if residual is not None and in_place:
        y = residual
    else:
        y = x.new_empty((images, rows, columns, len(weight))).permute(0, 3, 1, 2)
    if y.numel():
        pixels = None if geometry.stride == (1, 1) else Pixels(rows, columns, height, width, *geometry.stride)
        with torch.cuda.device_of(x):
            _launch(x, weight.contiguous(), (scale, bias, residual, y, pixels), images * rows * columns, act)
    return y


def _launch(x: Tensor, weight: Tensor, others: tuple[object, ...], m: int, act: Activation) -> None:
    """`others` are the kernel's own arguments that stand between both factors and the sizes."""
    n, k, *_ = weight.shape
    is_rows = others[-1] is None
    aligned = x.data_ptr() % _ALIGNMENT == weight.data_ptr() % _ALIGNMENT == 0
    problem = problem_of(m, n, k, x.dtype, is_rows and aligned)
    device = launch.device_of(x.device)
    blocks = launch.blocks_of(product_of(x.dtype), problem, device)
    factors: tuple[object, object] = x, weight
    if blocks.descriptors:
        assert problem.described, f"{blocks} of what descriptors can't describe"
        factors = _described(x, m, k, blocks.m, blocks.k), _described(weight, n, k, blocks.n, blocks.k)
    programs = min(problem.tiles(blocks), blocks.resident(device.capability, x.dtype.itemsize) * device.processors)
    constants = {"ACT": act.code, "TILING": _tiling(blocks, n, k), "num_stages": blocks.stages}
    launch.launch(conv_act, (programs,), (*factors, *others, m, n, k), constants, blocks.warps)


def problem_of(m: int, n: int, k: int, dtype: torch.dtype, is_aligned: bool) -> Problem:
    """Descriptors can describe rows one after the other, if memory is aligned and so is every row."""
    return Problem(m, n, k, dtype, is_aligned and k * dtype.itemsize % _ALIGNMENT == 0)


def form(weight: Sequence[int], geometry: Geometry, sizes: Sequence[int], dtype: torch.dtype) -> str:
    """How the current device cuts a convolution of aligned operands."""
    images, inputs, *sizes_of_x = sizes
    m = images * math.prod(geometry.output_size((1, 1), *sizes_of_x))
    problem = problem_of(m, weight[0], inputs, dtype, geometry.stride == (1, 1))
    return str(launch.blocks_of(product_of(dtype), problem, launch.device_of(torch.device("cuda"))))


def _described(t: Tensor, rows: int, channels: int, *block: int) -> TensorDescriptor:
    return TensorDescriptor(t, [rows, channels], [channels, 1], [*block])


@cache
def _tiling(blocks: Blocks, n: int, k: int) -> Tiling:
    rows = math.gcd(k, 16), math.gcd(n, 16)
    return Tiling(*map(tl.constexpr, (blocks.m, blocks.n, blocks.k, GROUP, *rows, blocks.descriptors)))

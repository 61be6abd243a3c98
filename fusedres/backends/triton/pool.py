"""A max-pool's windows over planes: which pixels a window compares, and which windows chose a pixel.

Both loops go through positions in rising order: row by row of the window, row by row of windows.
"""

# What is decorated is Triton's language, not Python.
# pyright: reportGeneralTypeIssues=false, reportInvalidTypeForm=false, reportAttributeAccessIssue=false

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fusedres.backends import Window
from fusedres.backends.triton.constants import keep_statistics, load_affine
from fusedres.backends.triton.epilogue import RELU, activation
from fusedres.backends.triton.tiles import inside, offsets_at, offsets_of, place_of, whole_rows

COMPARED_TOGETHER = tl.constexpr(9)  # positions of a window: their loads are on their way together
GATHERED_TOGETHER = tl.constexpr(4)  # windows of a pixel
PASSES_NOTHING = tl.constexpr(255)  # as `fusedres.ops.bn_act_pool` has it


class Pool(NamedTuple):
    """Planes of x and y, and what each window of y chose; the rest is tl.constexpr."""

    choice: Tensor | None  # (N, C, out_rows, out_columns) bytes
    rows: int
    columns: int
    out_rows: int
    out_columns: int
    kernel: tuple[Any, Any]
    stride: tuple[Any, Any]
    padding: tuple[Any, Any]
    covering: tuple[Any, Any]  # windows that a pixel may be in, along each axis
    index: Any  # the type that counts a plane's pixels

    @staticmethod
    @lru_cache(maxsize=1024)
    def of(window: Window, sizes: tuple[int, int]) -> Pool:
        """Windows over planes of (rows, columns), nothing chosen yet."""
        covering = tuple(-(-kernel // stride) for kernel, stride in zip(window.kernel_size, window.stride, strict=True))
        kernel, stride, padding, covering = (
            (tl.constexpr(rows), tl.constexpr(columns)) for rows, columns in (*window, covering)
        )
        # Pixels are divided by the length of a row: far cheaper in 32 bits.
        index = tl.constexpr(tl.int32 if math.prod(sizes) < 2**31 else tl.int64)
        return Pool(None, *sizes, *window.output_size(*sizes), kernel, stride, padding, covering, index)


@triton.jit
def pixels_of(place, pool, CUT: tl.constexpr):
    """(block_p,): the tile's pixels."""
    return (place.first_pixel + tl.arange(0, CUT.block_p)).to(pool.index)


@triton.jit
def largest_of_windows(x_ptr, pool, place, exists, affine, CUT: tl.constexpr):
    """The largest of every window's normalised values, rounded as x is, and its position.

    The first of equal values, but the last NaN, as in eager; where all are -inf, the first inside the plane.
    """
    mean, scale, shift = affine
    window = pixels_of(place, pool, CUT)
    top = window // pool.out_columns * pool.stride[0] - pool.padding[0]
    left = window % pool.out_columns * pool.stride[1] - pool.padding[1]
    first = tl.maximum(-top, 0) * pool.kernel[1] + tl.maximum(-left, 0)
    position = tl.broadcast_to(first[:, None], (CUT.block_p, CUT.block_c)).to(tl.int32)
    largest = tl.full((CUT.block_p, CUT.block_c), float("-inf"), CUT.acc)
    for at in tl.range(0, pool.kernel[0] * pool.kernel[1], loop_unroll_factor=COMPARED_TOGETHER):
        in_row = at // pool.kernel[1]
        row, column = top + in_row, left + (at - in_row * pool.kernel[1])
        within = ((row >= 0) & (row < pool.rows) & (column >= 0) & (column < pool.columns))[:, None] & exists
        offsets = offsets_at(row * pool.columns + column, place, pool.rows * pool.columns, CUT)
        x = tl.load(x_ptr + offsets, mask=within, other=0.0).to(CUT.acc)
        z = (x - mean[None, :]) * scale[None, :] + shift[None, :]
        z = z.to(x_ptr.dtype.element_ty).to(CUT.acc)
        wins = within & ((z > largest) | (z != z))
        largest = tl.where(wins, z, largest)
        position = tl.where(wins, at, position)
    return largest, position


@triton.jit(do_not_specialize=["tiles"])
def pool_apply(
    x,
    pool,
    y_ptr,
    eps: tl.float64,
    windows,
    channels,
    tiles,
    ACT: tl.constexpr,
    CUT: tl.constexpr,
):
    """y = maxpool(act((x - mean) * scale + shift)), and the position that each window chose.

    x: (N, C, pixels), y, choice: (N, C, windows), in either order. Each window reads and normalises its own pixels;
    from memory x is read once, as far as caches hold a window's rows. The activation comes after the comparison: it
    changes the position only where it is flat, and nothing passes there. Memory is walked backwards, as in `apply`.
    """
    windows, channels = whole_rows(windows, channels, CUT)
    channel_blocks = tl.cdiv(channels, CUT.block_c)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    first_channel = program % channel_blocks * CUT.block_c
    affine = load_affine(x, eps, first_channel, channels, CUT)
    if program < channel_blocks:
        keep_statistics(x, eps, first_channel, channels, CUT)

    for step in range(CUT.unroll):
        tile = program // channel_blocks * CUT.unroll + (CUT.unroll - 1 - step)
        place = place_of(tile, tiles, first_channel, windows, channels, CUT)
        exists = inside(place, CUT)
        offsets = offsets_of(place, CUT)
        largest, position = largest_of_windows(x.data, pool, place, exists, affine, CUT)
        if ACT == RELU:
            position = tl.where(largest <= 0, PASSES_NOTHING, position)
        tl.store(y_ptr + offsets, activation(largest, ACT).to(y_ptr.dtype.element_ty), mask=exists)
        if pool.choice is not None:
            tl.store(pool.choice + offsets, position.to(tl.uint8), mask=exists)


@triton.jit
def pooled_gradient(dy_ptr, pool, place, exists, CUT: tl.constexpr):
    """The sum of dy over the windows that chose each pixel."""
    pixel = pixels_of(place, pool, CUT)
    row, column = pixel // pool.columns + pool.padding[0], pixel % pool.columns + pool.padding[1]
    first_row = row // pool.stride[0] - (pool.covering[0] - 1)
    first_column = column // pool.stride[1] - (pool.covering[1] - 1)
    g = tl.zeros((CUT.block_p, CUT.block_c), CUT.acc)
    for at in tl.range(0, pool.covering[0] * pool.covering[1], loop_unroll_factor=GATHERED_TOGETHER):
        later_row = at // pool.covering[1]
        out_row, out_column = first_row + later_row, first_column + (at - later_row * pool.covering[1])
        in_row, in_column = row - out_row * pool.stride[0], column - out_column * pool.stride[1]
        covers = (out_row >= 0) & (out_row < pool.out_rows) & (in_row < pool.kernel[0])
        covers &= (out_column >= 0) & (out_column < pool.out_columns) & (in_column < pool.kernel[1])
        within = covers[:, None] & exists
        offsets = offsets_at(out_row * pool.out_columns + out_column, place, pool.out_rows * pool.out_columns, CUT)
        choice = tl.load(pool.choice + offsets, mask=within, other=PASSES_NOTHING).to(tl.int32)
        dy = tl.load(dy_ptr + offsets, mask=within, other=0.0).to(CUT.acc)
        g += tl.where(choice == (in_row * pool.kernel[1] + in_column)[:, None], dy, 0.0)
    return g

"""A 1x1 convolution as a matrix product of the pixels that it sees, with all that follows it in a block.

Programs persist: each takes every so many-th tile of y, so that one tile is read while another is written.
"""

# What is decorated is Triton's language, not Python.
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportGeneralTypeIssues=false
# pyright: reportInvalidTypeForm=false

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fusedres.backends.triton.constants import load_channels
from fusedres.backends.triton.epilogue import activation


class Pixels(NamedTuple):
    """Where y's pixels are in x where it has more: rows and columns of either's images, and the steps between them."""

    rows: Any
    columns: Any
    rows_of_x: Any
    columns_of_x: Any
    row_stride: Any
    column_stride: Any


class Tiling(NamedTuple):
    """How y is cut; members are tl.constexpr, so that kernels may use them as literals.

    Args:
        m, n, k: pixels, output channels and, at a time, input channels of a tile.
        group: tiles below each other that are taken before their neighbours, for the cache's sake.
        row_k, row_n: what divides the numbers of channels: 16, or the largest power of 2 below.
        descriptors: whether x and the weight are tensor descriptors, and no pointers.
    """

    m: Any
    n: Any
    k: Any
    group: Any
    row_k: Any
    row_n: Any
    descriptors: Any


@triton.jit
def whole(channels, ROW: tl.constexpr):
    """channels, for the compiler to see what divides them; whether 16 does, it sees itself."""
    if ROW < 16:
        channels = channels // ROW * ROW
    return channels


@triton.jit
def tile_at(index, m, n, TILING: tl.constexpr):
    """The first pixel and output channel of the index-th tile; groups of rows of tiles are taken column by column."""
    across = tl.cdiv(n, TILING.n)
    down = tl.cdiv(m, TILING.m)
    per_group = TILING.group * across
    first = index // per_group * TILING.group
    height = tl.minimum(down - first, TILING.group)
    within = index % per_group
    return (first + within % height) * TILING.m, within // height * TILING.n


@triton.jit
def pixels_seen(pixel, pixels):
    """Which pixels of x these of y see, int64."""
    if pixels is None:
        seen = pixel.to(tl.int64)
    else:
        rows, columns, rows_of_x, columns_of_x, row_stride, column_stride = pixels
        row = pixel // columns
        image = (row // rows).to(tl.int64)
        seen = (image * rows_of_x + row % rows * row_stride) * columns_of_x + pixel % columns * column_stride
    return seen


@triton.jit
def inside(row, rows, channel, channels):
    """(rows, channels): which elements exist."""
    return (row < rows)[:, None] & (channel < channels)[None, :]


@triton.jit
def offsets_of(row, channel, channels):
    """(rows, channels): where the elements are. int64: (4096, 64, 112, 112) passes 2^31."""
    return row.to(tl.int64)[:, None] * channels + channel[None, :]


@triton.jit
def load_factors(x, weight, pixels, first_m, first_n, first_k, m, n, k, TILING: tl.constexpr):
    """(m, k) of x and (n, k) of the weight, 0 beyond their ends."""
    if TILING.descriptors:
        x_tile = x.load([first_m, first_k])
        weight_tile = weight.load([first_n, first_k])
    else:
        pixel = first_m + tl.arange(0, TILING.m)
        output = first_n + tl.arange(0, TILING.n)
        channel = first_k + tl.arange(0, TILING.k)
        x_offsets = offsets_of(pixels_seen(pixel, pixels), channel, k)
        x_tile = tl.load(x + x_offsets, mask=inside(pixel, m, channel, k), other=0.0)
        weight_exists = inside(output, n, channel, k)
        weight_tile = tl.load(weight + offsets_of(output, channel, k), mask=weight_exists, other=0.0)
    return x_tile, weight_tile


@triton.jit
def pre_activation(sums, scale_ptr, bias_ptr, residual_ptr, offsets, exists, first_n, n, TILING: tl.constexpr):
    """sums * scale + bias + residual; -0 stands for an absent bias: t + -0 is t for every t."""
    scale = load_channels(scale_ptr, first_n, n, 1.0, tl.float32, TILING.n)
    bias = load_channels(bias_ptr, first_n, n, -0.0, tl.float32, TILING.n)
    z = sums * scale[None, :] + bias[None, :]
    if residual_ptr is not None:
        z += tl.load(residual_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
    return z


@triton.jit(do_not_specialize=["m"])
def conv_act(
    x,
    weight,
    scale_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    pixels,
    m,
    n,
    k,
    ACT: tl.constexpr,
    TILING: tl.constexpr,
):
    """y = act((x @ weight^T) * scale + bias + residual)

    x: (M, K), or images of which M pixels are seen; weight: (N, K); scale, bias: (N,); residual, y: (M, N), which may
    be one. Reads x, the weight and the residual, writes y: one rounding. What is read again should be in the cache.
    """
    k = whole(k, TILING.row_k)
    n = whole(n, TILING.row_n)
    tiles = tl.cdiv(m, TILING.m) * tl.cdiv(n, TILING.n)
    for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        first_m, first_n = tile_at(index, m, n, TILING)
        sums = tl.zeros((TILING.m, TILING.n), tl.float32)
        for first_k in range(0, k, TILING.k):
            x_tile, weight_tile = load_factors(x, weight, pixels, first_m, first_n, first_k, m, n, k, TILING)
            sums = tl.dot(x_tile, weight_tile.T, sums, input_precision="ieee")
        pixel = first_m + tl.arange(0, TILING.m)
        output = first_n + tl.arange(0, TILING.n)
        offsets, exists = offsets_of(pixel, output, n), inside(pixel, m, output, n)
        z = pre_activation(sums, scale_ptr, bias_ptr, residual_ptr, offsets, exists, first_n, n, TILING)
        tl.store(y_ptr + offsets, activation(z, ACT).to(y_ptr.dtype.element_ty), mask=exists)

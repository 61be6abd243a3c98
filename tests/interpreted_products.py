"""Wrong matrix products: each takes the place of one function of the Triton backend's and must fail a case."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from fusedres.backends.triton.product import Pixels, load_factors, pixels_seen, pre_activation


@triton.jit
def row_mask_dropped(row, rows, channel, channels):
    return (row >= 0)[:, None] & (channel < channels)[None, :]


@triton.jit
def channel_mask_dropped(row, rows, channel, channels):
    return (row < rows)[:, None] & (channel >= 0)[None, :]


@triton.jit
def strides_swapped(pixel, pixels):
    if pixels is None:
        seen = pixels_seen(pixel, None)
    else:
        rows, columns, rows_of_x, columns_of_x, row_stride, column_stride = pixels
        seen = pixels_seen(pixel, Pixels(rows, columns, rows_of_x, columns_of_x, column_stride, row_stride))
    return seen


@triton.jit
def strides_of_1(pixel, pixels):
    return pixels_seen(pixel, None)


@triton.jit
def images_as_large_as_the_results(pixel, pixels):
    if pixels is None:
        seen = pixels_seen(pixel, None)
    else:
        rows, columns, _, columns_of_x, row_stride, column_stride = pixels
        seen = pixels_seen(pixel, Pixels(rows, columns, rows, columns_of_x, row_stride, column_stride))
    return seen


@triton.jit
def last_input_channels_left_out(x, weight, pixels, first_m, first_n, first_k, m, n, k, TILING: tl.constexpr):
    x_tile, weight_tile = load_factors(x, weight, pixels, first_m, first_n, first_k, m, n, k, TILING)
    end = tl.full((TILING.m, TILING.k), first_k + TILING.k, tl.int32)
    return tl.where(end > k, 0.0, x_tile), weight_tile


@triton.jit
def first_input_channels_again(x, weight, pixels, first_m, first_n, first_k, m, n, k, TILING: tl.constexpr):
    return load_factors(x, weight, pixels, first_m, first_n, 0, m, n, k, TILING)


@triton.jit
def groups_all_of_one_height(index, m, n, TILING: tl.constexpr):
    per_group = TILING.group * tl.cdiv(n, TILING.n)
    within = index % per_group
    first = index // per_group * TILING.group
    return (first + within % TILING.group) * TILING.m, within // TILING.group * TILING.n


@triton.jit
def residual_forgotten(sums, scale_ptr, bias_ptr, residual_ptr, offsets, exists, first_n, n, TILING: tl.constexpr):
    return pre_activation(sums, scale_ptr, bias_ptr, None, offsets, exists, first_n, n, TILING)


@triton.jit
def bias_forgotten(sums, scale_ptr, bias_ptr, residual_ptr, offsets, exists, first_n, n, TILING: tl.constexpr):
    return pre_activation(sums, scale_ptr, None, residual_ptr, offsets, exists, first_n, n, TILING)


@triton.jit
def scale_forgotten(sums, scale_ptr, bias_ptr, residual_ptr, offsets, exists, first_n, n, TILING: tl.constexpr):
    return pre_activation(sums, None, bias_ptr, residual_ptr, offsets, exists, first_n, n, TILING)


@triton.jit
def bias_of_the_first_tile(sums, scale_ptr, bias_ptr, residual_ptr, offsets, exists, first_n, n, TILING: tl.constexpr):
    return pre_activation(sums, scale_ptr, bias_ptr, residual_ptr, offsets, exists, 0, n, TILING)


@triton.jit
def no_activation(z, ACT: tl.constexpr):
    return z


MUTANTS: dict[Any, str] = {
    row_mask_dropped: "inside",
    channel_mask_dropped: "inside",
    strides_swapped: "pixels_seen",
    strides_of_1: "pixels_seen",
    images_as_large_as_the_results: "pixels_seen",
    last_input_channels_left_out: "load_factors",
    first_input_channels_again: "load_factors",
    groups_all_of_one_height: "tile_at",
    residual_forgotten: "pre_activation",
    bias_forgotten: "pre_activation",
    scale_forgotten: "pre_activation",
    bias_of_the_first_tile: "pre_activation",
    no_activation: "activation",
}

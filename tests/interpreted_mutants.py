"""Wrong kernels: each takes the place of one function of the Triton backend and must fail the shared cases."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from fusedres.backends.triton import apply, gradients, statistics, tiles
from fusedres.backends.triton.constants import load_affine, load_gate
from fusedres.backends.triton.masks import load_mask
from fusedres.backends.triton.tiles import place_of


@triton.jit
def channel_mask_dropped(place, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    _, first_pixel, _, pixels, _ = place
    pixel = tl.arange(0, BLOCK_P) < pixels - first_pixel
    return pixel[:, None] & (tl.arange(0, BLOCK_C) >= 0)[None, :]


@triton.jit
def strides_swapped(place, CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    return tiles.offsets_of(place, not CHANNELS_LAST, BLOCK_P, BLOCK_C)


@triton.jit
def tiles_of_the_next_image(tile, tiles, first_channel, pixels, channels, BLOCK_P: tl.constexpr):
    image, first_pixel, first_channel, pixels, channels = place_of(
        tile, tiles, first_channel, pixels, channels, BLOCK_P
    )
    return image * 0, first_pixel, first_channel, pixels, channels


@triton.jit
def mean_skipped(
    centre_ptr,
    weight_ptr,
    bias_ptr,
    first_channel,
    channels,
    NORM: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    mean, scale, shift = load_affine(centre_ptr, weight_ptr, bias_ptr, first_channel, channels, NORM, ACC, BLOCK_C)
    return mean * 0, scale, shift


@triton.jit
def mean_folded_into_the_shift(
    centre_ptr,
    weight_ptr,
    bias_ptr,
    first_channel,
    channels,
    NORM: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    mean, scale, shift = load_affine(centre_ptr, weight_ptr, bias_ptr, first_channel, channels, NORM, ACC, BLOCK_C)
    return mean * 0, scale, shift - mean * scale


@triton.jit
def merge_forgotten(count_a, mean_a, m2_a, count_b, mean_b, m2_b):
    return count_a + count_b, tl.where(count_b > 0, mean_b, mean_a), m2_a + m2_b


@triton.jit
def spread_of_the_means_forgotten(count, mean, m2):
    total = tl.sum(count, axis=0)
    return total, tl.sum(count * mean, axis=0) / tl.maximum(total, 1.0), tl.sum(m2, axis=0)


@triton.jit
def pivot_dropped(
    x_ptr, first_channel, pixels, channels, CHANNELS_LAST: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr
):
    return tl.zeros((BLOCK_C,), ACC)


@triton.jit
def running_statistics_not_moved(running_ptr, now, momentum, channel, channels):
    tl.static_assert(True)


@triton.jit
def gate_left_out(gate_ptr, gate_strides, place, ACC: tl.constexpr, BLOCK_C: tl.constexpr):
    return load_gate(gate_ptr, gate_strides, place, ACC, BLOCK_C) * 0 + 1


@triton.jit
def mask_dropped(mask_ptr, place, CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    return tl.full((BLOCK_P, BLOCK_C), 1, tl.int1)


@triton.jit
def mask_of_the_next_pixel(mask_ptr, place, CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    bits = load_mask(mask_ptr, place, CHANNELS_LAST, BLOCK_P, BLOCK_C)
    return tl.reshape(tl.flip(tl.reshape(bits, (BLOCK_P * BLOCK_C,)), 0), (BLOCK_P, BLOCK_C))


@triton.jit
def gradient_of_the_identity(t, dy, ACT: tl.constexpr):
    return dy


@triton.jit
def mean_slopes_dropped(slopes_ptr, first_channel, channels, ACC: tl.constexpr, BLOCK_C: tl.constexpr):
    return tl.zeros((BLOCK_C,), ACC), tl.zeros((BLOCK_C,), ACC)


MUTANTS: dict[Any, tuple[tuple[Any, str], ...]] = {
    channel_mask_dropped: ((apply, "inside"), (gradients, "inside"), (statistics, "inside")),
    strides_swapped: ((apply, "offsets_of"),),
    tiles_of_the_next_image: ((apply, "place_of"),),
    mean_skipped: ((apply, "load_affine"),),
    mean_folded_into_the_shift: ((apply, "load_affine"),),
    merge_forgotten: ((statistics, "merge"),),
    spread_of_the_means_forgotten: ((statistics, "merge_all"),),
    pivot_dropped: ((statistics, "load_pivot"),),
    running_statistics_not_moved: ((statistics, "_move"),),
    gate_left_out: ((apply, "load_gate"),),
    mask_dropped: ((gradients, "load_mask"),),
    mask_of_the_next_pixel: ((gradients, "load_mask"),),
    gradient_of_the_identity: ((gradients, "activation_gradient"),),
    mean_slopes_dropped: ((gradients, "load_slopes"),),
}

"""Wrong kernels: each takes the place of one function of the Triton backend and must fail the shared cases."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from fusedres.backends.triton import apply, constants, gradients, pool, statistics
from fusedres.backends.triton.constants import load_affine, load_gate, load_running_rstd
from fusedres.backends.triton.masks import load_mask
from fusedres.backends.triton.pool import largest_of_windows, pixels_of, pooled_gradient
from fusedres.backends.triton.tiles import Place, offsets_of, place_of


@triton.jit
def channel_mask_dropped(place, CUT: tl.constexpr):
    pixel = tl.arange(0, CUT.block_p) < place.pixels - place.first_pixel
    return pixel[:, None] & (tl.arange(0, CUT.block_c) >= 0)[None, :]


@triton.jit
def strides_swapped(place, CUT: tl.constexpr):
    image, first_pixel, first_channel, pixels, channels = place
    return offsets_of(Place(image, first_pixel, first_channel, channels, pixels), CUT)


@triton.jit
def tiles_of_the_first_image(tile, tiles, first_channel, pixels, channels, CUT: tl.constexpr):
    place = place_of(tile, tiles, first_channel, pixels, channels, CUT)
    return Place(place.image * 0, place.first_pixel, first_channel, pixels, channels)


@triton.jit
def mean_skipped(operand, eps, first_channel, channels, CUT: tl.constexpr):
    mean, scale, shift = load_affine(operand, eps, first_channel, channels, CUT)
    return mean * 0, scale, shift


@triton.jit
def mean_folded_into_the_shift(operand, eps, first_channel, channels, CUT: tl.constexpr):
    mean, scale, shift = load_affine(operand, eps, first_channel, channels, CUT)
    return mean * 0, scale, shift - mean * scale


@triton.jit
def eps_left_out(operand, eps, first_channel, channels, CUT: tl.constexpr):
    return load_running_rstd(operand, 0.0, first_channel, channels, CUT)


@triton.jit
def running_statistics_not_kept(operand, eps, first_channel, channels, CUT: tl.constexpr):
    tl.static_assert(True)


@triton.jit
def merge_forgotten(count_a, mean_a, m2_a, count_b, mean_b, m2_b):
    return count_a + count_b, tl.where(count_b > 0, mean_b, mean_a), m2_a + m2_b


@triton.jit
def spread_of_the_means_forgotten(count, mean, m2):
    total = tl.sum(count, axis=0)
    return total, tl.sum(count * mean, axis=0) / tl.maximum(total, 1.0), tl.sum(m2, axis=0)


@triton.jit
def pivot_dropped(x_ptr, first_channel, pixels, channels, CUT: tl.constexpr, BLOCK_C: tl.constexpr):
    return tl.zeros((BLOCK_C,), CUT.acc)


@triton.jit
def running_statistics_not_moved(running_ptr, now, momentum, channel, channels):
    tl.static_assert(True)


@triton.jit
def gate_left_out(gate, place, CUT: tl.constexpr):
    return load_gate(gate, place, CUT) * 0 + 1


@triton.jit
def mask_dropped(mask_ptr, place, CUT: tl.constexpr):
    return tl.full((CUT.block_p, CUT.block_c), 1, tl.int1)


@triton.jit
def mask_of_the_next_pixel(mask_ptr, place, CUT: tl.constexpr):
    bits = load_mask(mask_ptr, place, CUT)
    return tl.reshape(tl.flip(tl.reshape(bits, (CUT.block_p * CUT.block_c,)), 0), (CUT.block_p, CUT.block_c))


@triton.jit
def gradient_of_the_identity(t, dy, ACT: tl.constexpr):
    return dy


@triton.jit
def mean_slopes_dropped(slopes_ptr, first_channel, channels, CUT: tl.constexpr):
    return tl.zeros((CUT.block_c,), CUT.acc), tl.zeros((CUT.block_c,), CUT.acc)


@triton.jit
def next_pixel_pooled(place, pool, CUT: tl.constexpr):
    return pixels_of(place, pool, CUT) + 1


@triton.jit
def position_of_the_first_value(x_ptr, pool, place, exists, affine, CUT: tl.constexpr):
    largest, position = largest_of_windows(x_ptr, pool, place, exists, affine, CUT)
    return largest, position * 0


@triton.jit
def gradient_of_one_window(dy_ptr, pool, place, exists, CUT: tl.constexpr):
    g = pooled_gradient(dy_ptr, pool, place, exists, CUT)
    return tl.where((pixels_of(place, pool, CUT) % 2 == 0)[:, None], g, 0.0)


MUTANTS: dict[Any, tuple[tuple[Any, str], ...]] = {
    channel_mask_dropped: ((apply, "inside"), (gradients, "inside"), (statistics, "inside")),
    strides_swapped: ((apply, "offsets_of"),),
    tiles_of_the_first_image: ((apply, "place_of"),),
    mean_skipped: ((apply, "load_affine"),),
    mean_folded_into_the_shift: ((apply, "load_affine"),),
    eps_left_out: ((constants, "load_running_rstd"),),
    running_statistics_not_kept: ((apply, "keep_statistics"),),
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
POOL_MUTANTS: dict[Any, tuple[tuple[Any, str], ...]] = {
    next_pixel_pooled: ((pool, "pixels_of"),),
    position_of_the_first_value: ((pool, "largest_of_windows"),),
    gradient_of_one_window: ((gradients, "pooled_gradient"),),
    mean_folded_into_the_shift: ((pool, "load_affine"),),
    channel_mask_dropped: ((pool, "inside"),),
    tiles_of_the_first_image: ((pool, "place_of"),),
}

"""Batch statistics: partial ones of a part of the tensor a program, then merged in a fixed order.

A part is every parts-th tile, so that all programs sweep through memory together. Never E[x^2] - E[x]^2: each position
of a tile sums deviations from the first value it meets. That value is among those it sums, which bounds the variance's
relative error by the number of its values, however far out it lies.
"""

# What is decorated is Triton's language, not Python.
# pyright: reportGeneralTypeIssues=false, reportInvalidTypeForm=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

from fusedres.backends.triton.tiles import inside, offsets_of, place_of, whole_rows


@triton.jit
def load_pivot(x_ptr, first_channel, pixels, channels, CUT: tl.constexpr, BLOCK_C: tl.constexpr):
    """(BLOCK_C,): each channel's first value, or 0 where that is not finite: what means are relative to."""
    channel = first_channel + tl.arange(0, BLOCK_C).to(tl.int64)
    offsets = channel if CUT.channels_last else channel * pixels
    first = tl.load(x_ptr + offsets, mask=channel < channels, other=0.0).to(CUT.acc)
    return tl.where(first - first == 0, first, 0.0)


@triton.jit
def merge(count_a, mean_a, m2_a, count_b, mean_b, m2_b):
    """Mean and sum of squared deviations of two sets together (Chan, Golub, LeVeque 1979)."""
    count = count_a + count_b
    share = count_b / tl.maximum(count, 1.0)
    delta = mean_b - mean_a
    # An infinite part makes the mean infinite, as it does in eager; through delta it would become NaN.
    mean = tl.where(delta - delta == 0, mean_a + delta * share, mean_a + mean_b)
    return count, mean, m2_a + m2_b + delta * delta * count_a * share


@triton.jit
def merge_all(count, mean, m2):
    """The same of all sets along the first axis."""
    total = tl.sum(count, axis=0)
    average = tl.sum(count * mean, axis=0) / tl.maximum(total, 1.0)
    distance = tl.where(count > 0, mean - average[None, :], 0.0)
    return total, average, tl.sum(m2 + count * distance * distance, axis=0)


@triton.jit(do_not_specialize=["tiles", "parts"])
def statistics_parts(x_ptr, parts_ptr, pixels, channels, tiles, parts, CUT: tl.constexpr):
    """count, mean - pivot and sum (x - mean)^2 of every part and channel.

    x: (N, C, pixels) in either order; parts: (3, parts, C) in acc. Reads x once.
    """
    pixels, channels = whole_rows(pixels, channels, CUT)
    channel_blocks = tl.cdiv(channels, CUT.block_c)
    part = tl.program_id(0) // channel_blocks
    first_channel = tl.program_id(0) % channel_blocks * CUT.block_c
    pivot = load_pivot(x_ptr, first_channel, pixels, channels, CUT, CUT.block_c)

    place = place_of(part, tiles, first_channel, pixels, channels, CUT)
    exists = inside(place, CUT)
    x = tl.load(x_ptr + offsets_of(place, CUT), mask=exists, other=0.0).to(CUT.acc)
    origin = tl.where(exists & (x - x == 0), x, pivot[None, :])
    deviation = tl.where(exists, x - origin, 0.0)
    count, total, squares = exists.to(CUT.acc), deviation, deviation * deviation

    later_tiles = tl.cdiv(tiles - part, parts) - 1
    for step in range(tl.cdiv(later_tiles, CUT.unroll)):
        for u in tl.static_range(CUT.unroll):
            tile = part + (1 + step * CUT.unroll + u) * parts
            place = place_of(tile, tiles, first_channel, pixels, channels, CUT)
            exists = inside(place, CUT)
            x = tl.load(x_ptr + offsets_of(place, CUT), mask=exists, other=0.0).to(CUT.acc)
            deviation = tl.where(exists, x - origin, 0.0)
            count += exists.to(CUT.acc)
            total += deviation
            squares += deviation * deviation

    shift = total / tl.maximum(count, 1.0)
    squares -= total * shift
    squares = tl.where(squares < 0, 0.0, squares)
    count, mean, m2 = merge_all(count, origin - pivot[None, :] + shift, squares)

    channel = first_channel + tl.arange(0, CUT.block_c)
    row_ptr = parts_ptr + part.to(tl.int64) * channels + channel
    size = parts.to(tl.int64) * channels
    tl.store(row_ptr, count, mask=channel < channels)
    tl.store(row_ptr + size, mean, mask=channel < channels)
    tl.store(row_ptr + 2 * size, m2, mask=channel < channels)


@triton.jit(do_not_specialize=["parts"])
def statistics_finish(
    x_ptr,
    parts_ptr,
    running_mean_ptr,
    running_var_ptr,
    stats_ptr,
    pixels,
    channels,
    parts,
    momentum: tl.float64,
    eps: tl.float64,
    CUT: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The mean's high part, its remainder and 1 / sqrt(var + eps): stats (3, C) in acc; running statistics move.

    The parts are merged in fp64, in an order that depends on their number alone.
    """
    first_channel = tl.program_id(1) * BLOCK_C
    channel = first_channel + tl.arange(0, BLOCK_C)
    size = parts.to(tl.int64) * channels
    count = tl.zeros((BLOCK_PARTS, BLOCK_C), tl.float64)
    mean, m2 = count, count
    for step in range(tl.cdiv(parts, BLOCK_PARTS)):
        part = (step * BLOCK_PARTS + tl.arange(0, BLOCK_PARTS))[:, None]
        exists = (part < parts) & (channel < channels)[None, :]
        row_ptr = parts_ptr + part.to(tl.int64) * channels + channel[None, :]
        part_count = tl.load(row_ptr, mask=exists, other=0.0).to(tl.float64)
        part_mean = tl.load(row_ptr + size, mask=exists, other=0.0).to(tl.float64)
        part_m2 = tl.load(row_ptr + 2 * size, mask=exists, other=0.0).to(tl.float64)
        count, mean, m2 = merge(count, mean, m2, part_count, part_mean, part_m2)
    count, mean, m2 = merge_all(count, mean, m2)
    mean += load_pivot(x_ptr, first_channel, pixels, channels, CUT, BLOCK_C).to(tl.float64)
    _move(running_mean_ptr, mean, momentum, channel, channels)
    _move(running_var_ptr, m2 / tl.maximum(count - 1, 1.0), momentum, channel, channels)

    high = mean.to(CUT.acc)
    # An infinite mean has no remainder.
    low = tl.where(high - high == 0, mean - high.to(tl.float64), 0.0)
    rstd = 1 / tl.sqrt(m2 / tl.maximum(count, 1.0) + eps)
    tl.store(stats_ptr + channel, high, mask=channel < channels)
    tl.store(stats_ptr + channels + channel, low.to(CUT.acc), mask=channel < channels)
    tl.store(stats_ptr + 2 * channels + channel, rstd.to(CUT.acc), mask=channel < channels)


@triton.jit
def _move(running_ptr, now, momentum, channel, channels):
    if running_ptr is not None:
        before = tl.load(running_ptr + channel, mask=channel < channels, other=0.0).to(tl.float64)
        after = before * (1 - momentum) + now * momentum
        tl.store(running_ptr + channel, after.to(running_ptr.dtype.element_ty), mask=channel < channels)

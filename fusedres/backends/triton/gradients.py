"""The backward's two passes over the tensor, and what is worked out per channel between them."""

# What is decorated is Triton's language, not Python.
# pyright: reportGeneralTypeIssues=false, reportInvalidTypeForm=false

import triton
import triton.language as tl

from fusedres.backends.triton.apply import pre_activation
from fusedres.backends.triton.constants import load_affine, load_channels, load_gate, load_remainder
from fusedres.backends.triton.epilogue import IDENTITY, activation_gradient
from fusedres.backends.triton.masks import load_mask
from fusedres.backends.triton.tiles import inside, offsets_of, place_of


@triton.jit
def gradient_at(
    dy_ptr,
    y_ptr,
    mask_ptr,
    x_ptr,
    r_ptr,
    offsets,
    exists,
    place,
    x_affine,
    r_affine,
    gate_ptr,
    gate_strides,
    ACT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """g = dy * act'(z) of a tile, from the mask, the output y, or z recomputed; 0 where nothing exists."""
    g = tl.load(dy_ptr + offsets, mask=exists, other=0.0).to(ACC)
    if mask_ptr is not None:
        g = tl.where(load_mask(mask_ptr, place, CHANNELS_LAST, BLOCK_P, BLOCK_C), g, 0.0)
    elif y_ptr is not None:
        y = tl.load(y_ptr + offsets, mask=exists, other=0.0).to(ACC)
        g = activation_gradient(y, g, ACT)
    elif ACT != IDENTITY:
        x = tl.load(x_ptr + offsets, mask=exists, other=0.0).to(ACC)
        z = pre_activation(x, r_ptr, offsets, exists, place, x_affine, r_affine, gate_ptr, gate_strides, ACC, BLOCK_C)
        g = tl.where(exists, activation_gradient(z, g, ACT), 0.0)
    return g


@triton.jit(do_not_specialize=["tiles", "groups", "pieces"])
def gradient_sums(
    dy_ptr,
    y_ptr,
    mask_ptr,
    x_ptr,
    x_centre_ptr,
    x_weight_ptr,
    x_bias_ptr,
    r_ptr,
    r_centre_ptr,
    r_weight_ptr,
    r_bias_ptr,
    gate_ptr,
    gate_strides,
    sums_ptr,
    pixels,
    channels,
    tiles,
    groups,
    pieces,
    NORM_X: tl.constexpr,
    NORM_R: tl.constexpr,
    PRODUCT_X: tl.constexpr,
    PRODUCT_R: tl.constexpr,
    ACT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """sum g, with PRODUCT_X sum g * (x - mean), with PRODUCT_R sum g * (r - mean_r), of every part and channel.

    dy, y, x, r: (N, C, pixels) in either order; sums: (3, groups * pieces, C) in ACC. A part is every pieces-th tile
    of a group: of an image where the gate has a value per image, else of everything. Reads each tensor once.
    """
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    part = tl.program_id(0) // channel_blocks
    first_channel = tl.program_id(0) % channel_blocks * BLOCK_C
    x_affine = load_affine(x_centre_ptr, x_weight_ptr, x_bias_ptr, first_channel, channels, NORM_X, ACC, BLOCK_C)
    r_affine = load_affine(r_centre_ptr, r_weight_ptr, r_bias_ptr, first_channel, channels, NORM_R, ACC, BLOCK_C)
    mean, mean_r = x_affine[0], r_affine[0]

    group_tiles = tiles // groups
    first_tile = part // pieces * group_tiles
    sum_g = tl.zeros((BLOCK_P, BLOCK_C), ACC)
    sum_gx, sum_gr = sum_g, sum_g
    for step in range(tl.cdiv(group_tiles - part % pieces, pieces * UNROLL)):
        for u in tl.static_range(UNROLL):
            tile = first_tile + part % pieces + (step * UNROLL + u) * pieces
            place = place_of(tile, first_tile + group_tiles, first_channel, pixels, channels, BLOCK_P)
            exists = inside(place, BLOCK_P, BLOCK_C)
            offsets = offsets_of(place, CHANNELS_LAST, BLOCK_P, BLOCK_C)
            g = gradient_at(
                dy_ptr,
                y_ptr,
                mask_ptr,
                x_ptr,
                r_ptr,
                offsets,
                exists,
                place,
                x_affine,
                r_affine,
                gate_ptr,
                gate_strides,
                ACT,
                CHANNELS_LAST,
                ACC,
                BLOCK_P,
                BLOCK_C,
            )
            sum_g += g
            if PRODUCT_X:
                x = tl.load(x_ptr + offsets, mask=exists, other=0.0).to(ACC)
                sum_gx += g * tl.where(exists, x - mean[None, :], 0.0)
            if PRODUCT_R:
                r = tl.load(r_ptr + offsets, mask=exists, other=0.0).to(ACC)
                sum_gr += g * tl.where(exists, r - mean_r[None, :], 0.0)

    channel = first_channel + tl.arange(0, BLOCK_C)
    row_ptr = sums_ptr + part.to(tl.int64) * channels + channel
    size = (groups * pieces).to(tl.int64) * channels
    tl.store(row_ptr, tl.sum(sum_g, axis=0), mask=channel < channels)
    if PRODUCT_X:
        tl.store(row_ptr + size, tl.sum(sum_gx, axis=0), mask=channel < channels)
    if PRODUCT_R:
        tl.store(row_ptr + 2 * size, tl.sum(sum_gr, axis=0), mask=channel < channels)


@triton.jit(do_not_specialize=["parts", "pieces"])
def gradient_finish(
    sums_ptr,
    products_ptr,
    centre_ptr,
    weight_ptr,
    gate_ptr,
    gate_strides,
    dweight_ptr,
    dbias_ptr,
    slopes_ptr,
    values: tl.float64,
    channels,
    parts,
    pieces,
    NORM: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One operand's parameter gradients, and what its batch statistics add to its own gradient.

        dbias = sum k * g,  dweight = sum k * g * xhat,  B = -A * rstd * dweight / M,  D = -A * dbias / M,
        A = weight * rstd

    sums, products: (parts, C); slopes: (2, C), B and D for the mean's high part. Merged in fp64, in an order that
    depends on the number of parts alone.
    """
    first_channel = tl.program_id(1) * BLOCK_C
    channel = first_channel + tl.arange(0, BLOCK_C)
    sum_g = tl.zeros((BLOCK_PARTS, BLOCK_C), tl.float64)
    sum_gx = sum_g
    for step in range(tl.cdiv(parts, BLOCK_PARTS)):
        part = (step * BLOCK_PARTS + tl.arange(0, BLOCK_PARTS))[:, None]
        exists = (part < parts) & (channel < channels)[None, :]
        row_offsets = part.to(tl.int64) * channels + channel[None, :]
        g = tl.load(sums_ptr + row_offsets, mask=exists, other=0.0).to(tl.float64)
        gx = g
        if products_ptr is not None:
            gx = tl.load(products_ptr + row_offsets, mask=exists, other=0.0).to(tl.float64)
        if gate_ptr is not None:
            gate_offsets = part // pieces * gate_strides[0] + channel[None, :] * gate_strides[1]
            k = tl.load(gate_ptr + gate_offsets, mask=exists, other=0.0).to(tl.float64)
            g, gx = k * g, k * gx
        sum_g += g
        sum_gx += gx

    low, rstd = load_remainder(centre_ptr, first_channel, channels, NORM, tl.float64, BLOCK_C)
    dbias = tl.sum(sum_g, axis=0)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + channel, dbias.to(dbias_ptr.dtype.element_ty), mask=channel < channels)
    if products_ptr is not None:
        dweight = (tl.sum(sum_gx, axis=0) - low * dbias) * rstd
        if dweight_ptr is not None:
            tl.store(dweight_ptr + channel, dweight.to(dweight_ptr.dtype.element_ty), mask=channel < channels)
        if slopes_ptr is not None:
            scale = load_channels(weight_ptr, first_channel, channels, 1.0, tl.float64, BLOCK_C) * rstd
            b = -scale * rstd * dweight / values
            d = -scale * dbias / values - b * low
            tl.store(slopes_ptr + channel, b.to(slopes_ptr.dtype.element_ty), mask=channel < channels)
            tl.store(slopes_ptr + channels + channel, d.to(slopes_ptr.dtype.element_ty), mask=channel < channels)


@triton.jit(do_not_specialize=["pieces"])
def gate_finish(
    sums_ptr,
    products_ptr,
    centre_ptr,
    weight_ptr,
    bias_ptr,
    dgate_ptr,
    channels,
    pieces,
    NORM: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dk = sum g * (xhat * weight + bias) of every group: dgate (groups, C)."""
    group, first_channel = tl.program_id(0), tl.program_id(1) * BLOCK_C
    channel = first_channel + tl.arange(0, BLOCK_C)
    sum_g = tl.zeros((BLOCK_PARTS, BLOCK_C), tl.float64)
    sum_gx = sum_g
    for step in range(tl.cdiv(pieces, BLOCK_PARTS)):
        piece = (step * BLOCK_PARTS + tl.arange(0, BLOCK_PARTS))[:, None]
        exists = (piece < pieces) & (channel < channels)[None, :]
        row_offsets = (group.to(tl.int64) * pieces + piece) * channels + channel[None, :]
        sum_g += tl.load(sums_ptr + row_offsets, mask=exists, other=0.0).to(tl.float64)
        sum_gx += tl.load(products_ptr + row_offsets, mask=exists, other=0.0).to(tl.float64)

    low, rstd = load_remainder(centre_ptr, first_channel, channels, NORM, tl.float64, BLOCK_C)
    scale = load_channels(weight_ptr, first_channel, channels, 1.0, tl.float64, BLOCK_C) * rstd
    bias = load_channels(bias_ptr, first_channel, channels, 0.0, tl.float64, BLOCK_C)
    g = tl.sum(sum_g, axis=0)
    dgate = scale * (tl.sum(sum_gx, axis=0) - low * g) + bias * g
    tl.store(
        dgate_ptr + group.to(tl.int64) * channels + channel,
        dgate.to(dgate_ptr.dtype.element_ty),
        mask=channel < channels,
    )


@triton.jit(do_not_specialize=["tiles"])
def gradient_apply(
    dy_ptr,
    y_ptr,
    mask_ptr,
    x_ptr,
    x_centre_ptr,
    x_weight_ptr,
    x_bias_ptr,
    x_slopes_ptr,
    r_ptr,
    r_centre_ptr,
    r_weight_ptr,
    r_bias_ptr,
    r_slopes_ptr,
    gate_ptr,
    gate_strides,
    dx_ptr,
    dr_ptr,
    pixels,
    channels,
    tiles,
    NORM_X: tl.constexpr,
    NORM_R: tl.constexpr,
    ACT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """dx = A * k * g + B * (x - mean) + D,  dr the same of r without k; B and D only of batch statistics.

    dy, y, x, r, dx, dr: (N, C, pixels) in either order. Reads dy, what tells the slope, x and r where they are needed,
    writes dx and dr. Memory is walked backwards: the last that the sums read is what the cache still holds.
    """
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    first_channel = program % channel_blocks * BLOCK_C
    x_affine = load_affine(x_centre_ptr, x_weight_ptr, x_bias_ptr, first_channel, channels, NORM_X, ACC, BLOCK_C)
    r_affine = load_affine(r_centre_ptr, r_weight_ptr, r_bias_ptr, first_channel, channels, NORM_R, ACC, BLOCK_C)
    mean, scale, _ = x_affine
    mean_r, scale_r, _ = r_affine
    x_slopes = load_slopes(x_slopes_ptr, first_channel, channels, ACC, BLOCK_C)
    r_slopes = load_slopes(r_slopes_ptr, first_channel, channels, ACC, BLOCK_C)

    for step in range(UNROLL):
        tile = program // channel_blocks * UNROLL + (UNROLL - 1 - step)
        place = place_of(tile, tiles, first_channel, pixels, channels, BLOCK_P)
        exists = inside(place, BLOCK_P, BLOCK_C)
        offsets = offsets_of(place, CHANNELS_LAST, BLOCK_P, BLOCK_C)
        g = gradient_at(
            dy_ptr,
            y_ptr,
            mask_ptr,
            x_ptr,
            r_ptr,
            offsets,
            exists,
            place,
            x_affine,
            r_affine,
            gate_ptr,
            gate_strides,
            ACT,
            CHANNELS_LAST,
            ACC,
            BLOCK_P,
            BLOCK_C,
        )
        if dx_ptr is not None:
            dx = g * scale[None, :]
            if gate_ptr is not None:
                dx *= load_gate(gate_ptr, gate_strides, place, ACC, BLOCK_C)[None, :]
            if x_slopes_ptr is not None:
                x = tl.load(x_ptr + offsets, mask=exists, other=0.0).to(ACC)
                dx += x_slopes[0][None, :] * (x - mean[None, :]) + x_slopes[1][None, :]
            tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=exists)
        if dr_ptr is not None:
            dr = g * scale_r[None, :]
            if r_slopes_ptr is not None:
                r = tl.load(r_ptr + offsets, mask=exists, other=0.0).to(ACC)
                dr += r_slopes[0][None, :] * (r - mean_r[None, :]) + r_slopes[1][None, :]
            tl.store(dr_ptr + offsets, dr.to(dr_ptr.dtype.element_ty), mask=exists)


@triton.jit
def load_slopes(slopes_ptr, first_channel, channels, ACC: tl.constexpr, BLOCK_C: tl.constexpr):
    """B and D as two (BLOCK_C,); 0 without batch statistics."""
    if slopes_ptr is None:
        b = tl.full((BLOCK_C,), 0.0, ACC)
        d = b
    else:
        b = load_channels(slopes_ptr, first_channel, channels, 0.0, ACC, BLOCK_C)
        d = load_channels(slopes_ptr + channels, first_channel, channels, 0.0, ACC, BLOCK_C)
    return b, d

"""The backward's two passes over the tensor, and what is worked out per channel between them."""

# What is decorated is Triton's language, not Python.
# pyright: reportGeneralTypeIssues=false, reportInvalidTypeForm=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

from fusedres.backends.triton.apply import pre_activation
from fusedres.backends.triton.constants import load_affine, load_channels, load_gate, load_remainder
from fusedres.backends.triton.epilogue import IDENTITY, activation_gradient
from fusedres.backends.triton.masks import load_mask
from fusedres.backends.triton.pool import pooled_gradient
from fusedres.backends.triton.tiles import inside, offsets_of, place_of, whole_rows


@triton.jit
def gradient_at(
    slope, pool, x, r, gate, offsets, exists, place, x_affine, r_affine, ACT: tl.constexpr, CUT: tl.constexpr
):
    """g = dy * act'(z) of a tile, from the windows that chose it, the mask, y, or z recomputed; 0 beyond the tensor."""
    if pool is not None:
        g = pooled_gradient(slope.dy, pool, place, exists, CUT)
    else:
        g = tl.load(slope.dy + offsets, mask=exists, other=0.0).to(CUT.acc)
        if slope.mask is not None:
            g = tl.where(load_mask(slope.mask, place, CUT), g, 0.0)
        elif slope.y is not None:
            y = tl.load(slope.y + offsets, mask=exists, other=0.0).to(CUT.acc)
            g = activation_gradient(y, g, ACT)
        elif ACT != IDENTITY:
            x_tile = tl.load(x.data + offsets, mask=exists, other=0.0).to(CUT.acc)
            z = pre_activation(x_tile, r, gate, offsets, exists, place, x_affine, r_affine, CUT)
            g = tl.where(exists, activation_gradient(z, g, ACT), 0.0)
    return g


@triton.jit(do_not_specialize=["tiles", "groups", "pieces"])
def gradient_sums(
    slope,
    pool,
    x,
    r,
    gate,
    sums_ptr,
    pixels,
    channels,
    tiles,
    groups,
    pieces,
    PRODUCT_X: tl.constexpr,
    PRODUCT_R: tl.constexpr,
    ACT: tl.constexpr,
    CUT: tl.constexpr,
):
    """sum g, with PRODUCT_X sum g * (x - mean), with PRODUCT_R sum g * (r - mean_r), of every part and channel.

    dy, y, x, r: (N, C, pixels) in either order; sums: (3, groups * pieces, C) in acc. A part is every pieces-th tile
    of a group: of an image where the gate has a value per image, else of everything. Reads each tensor once.
    """
    pixels, channels = whole_rows(pixels, channels, CUT)
    channel_blocks = tl.cdiv(channels, CUT.block_c)
    part = tl.program_id(0) // channel_blocks
    first_channel = tl.program_id(0) % channel_blocks * CUT.block_c
    x_affine = load_affine(x, 0.0, first_channel, channels, CUT)
    r_affine = load_affine(r, 0.0, first_channel, channels, CUT)
    mean, mean_r = x_affine[0], r_affine[0]

    group_tiles = tiles // groups
    first_tile = part // pieces * group_tiles
    sum_g = tl.zeros((CUT.block_p, CUT.block_c), CUT.acc)
    sum_gx, sum_gr = sum_g, sum_g
    for step in range(tl.cdiv(group_tiles - part % pieces, pieces * CUT.unroll)):
        for u in tl.static_range(CUT.unroll):
            tile = first_tile + part % pieces + (step * CUT.unroll + u) * pieces
            place = place_of(tile, first_tile + group_tiles, first_channel, pixels, channels, CUT)
            exists = inside(place, CUT)
            offsets = offsets_of(place, CUT)
            g = gradient_at(slope, pool, x, r, gate, offsets, exists, place, x_affine, r_affine, ACT, CUT)
            sum_g += g
            if PRODUCT_X:
                x_tile = tl.load(x.data + offsets, mask=exists, other=0.0).to(CUT.acc)
                sum_gx += g * tl.where(exists, x_tile - mean[None, :], 0.0)
            if PRODUCT_R:
                r_tile = tl.load(r.data + offsets, mask=exists, other=0.0).to(CUT.acc)
                sum_gr += g * tl.where(exists, r_tile - mean_r[None, :], 0.0)

    channel = first_channel + tl.arange(0, CUT.block_c)
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
    operand,
    gate,
    dweight_ptr,
    dbias_ptr,
    slopes_ptr,
    values: tl.float64,
    channels,
    parts,
    pieces,
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
        if gate.data is not None:
            gate_offsets = part // pieces * gate.image_stride + channel[None, :] * gate.channel_stride
            k = tl.load(gate.data + gate_offsets, mask=exists, other=0.0).to(tl.float64)
            g, gx = k * g, k * gx
        sum_g += g
        sum_gx += gx

    low, rstd = load_remainder(operand.stats, first_channel, channels, tl.float64, BLOCK_C)
    dbias = tl.sum(sum_g, axis=0)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + channel, dbias.to(dbias_ptr.dtype.element_ty), mask=channel < channels)
    if products_ptr is not None:
        dweight = (tl.sum(sum_gx, axis=0) - low * dbias) * rstd
        if dweight_ptr is not None:
            tl.store(dweight_ptr + channel, dweight.to(dweight_ptr.dtype.element_ty), mask=channel < channels)
        if slopes_ptr is not None:
            scale = load_channels(operand.weight, first_channel, channels, 1.0, tl.float64, BLOCK_C) * rstd
            b = -scale * rstd * dweight / values
            d = -scale * dbias / values - b * low
            tl.store(slopes_ptr + channel, b.to(slopes_ptr.dtype.element_ty), mask=channel < channels)
            tl.store(slopes_ptr + channels + channel, d.to(slopes_ptr.dtype.element_ty), mask=channel < channels)


@triton.jit(do_not_specialize=["pieces"])
def gate_finish(
    sums_ptr, products_ptr, operand, dgate_ptr, channels, pieces, BLOCK_PARTS: tl.constexpr, BLOCK_C: tl.constexpr
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

    low, rstd = load_remainder(operand.stats, first_channel, channels, tl.float64, BLOCK_C)
    scale = load_channels(operand.weight, first_channel, channels, 1.0, tl.float64, BLOCK_C) * rstd
    bias = load_channels(operand.bias, first_channel, channels, 0.0, tl.float64, BLOCK_C)
    g = tl.sum(sum_g, axis=0)
    dgate = scale * (tl.sum(sum_gx, axis=0) - low * g) + bias * g
    row_ptr = dgate_ptr + group.to(tl.int64) * channels + channel
    tl.store(row_ptr, dgate.to(dgate_ptr.dtype.element_ty), mask=channel < channels)


@triton.jit(do_not_specialize=["tiles"])
def gradient_apply(
    slope,
    pool,
    x,
    r,
    gate,
    x_slopes_ptr,
    r_slopes_ptr,
    dx_ptr,
    dr_ptr,
    pixels,
    channels,
    tiles,
    ACT: tl.constexpr,
    CUT: tl.constexpr,
):
    """dx = A * k * g + B * (x - mean) + D,  dr the same of r without k; B and D only of batch statistics.

    dy, y, x, r, dx, dr: (N, C, pixels) in either order. Reads dy, what tells the slope, x and r where they are needed,
    writes dx and dr. Memory is walked backwards: the last that the sums read is what the cache still holds.
    """
    pixels, channels = whole_rows(pixels, channels, CUT)
    channel_blocks = tl.cdiv(channels, CUT.block_c)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    first_channel = program % channel_blocks * CUT.block_c
    x_affine = load_affine(x, 0.0, first_channel, channels, CUT)
    r_affine = load_affine(r, 0.0, first_channel, channels, CUT)
    mean, scale, _ = x_affine
    mean_r, scale_r, _ = r_affine
    x_slopes = load_slopes(x_slopes_ptr, first_channel, channels, CUT)
    r_slopes = load_slopes(r_slopes_ptr, first_channel, channels, CUT)

    for step in range(CUT.unroll):
        tile = program // channel_blocks * CUT.unroll + (CUT.unroll - 1 - step)
        place = place_of(tile, tiles, first_channel, pixels, channels, CUT)
        exists = inside(place, CUT)
        offsets = offsets_of(place, CUT)
        g = gradient_at(slope, pool, x, r, gate, offsets, exists, place, x_affine, r_affine, ACT, CUT)
        if dx_ptr is not None:
            dx = g * scale[None, :]
            if gate.data is not None:
                dx *= load_gate(gate, place, CUT)[None, :]
            if x_slopes_ptr is not None:
                x_tile = tl.load(x.data + offsets, mask=exists, other=0.0).to(CUT.acc)
                dx += x_slopes[0][None, :] * (x_tile - mean[None, :]) + x_slopes[1][None, :]
            tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=exists)
        if dr_ptr is not None:
            dr = g * scale_r[None, :]
            if r_slopes_ptr is not None:
                r_tile = tl.load(r.data + offsets, mask=exists, other=0.0).to(CUT.acc)
                dr += r_slopes[0][None, :] * (r_tile - mean_r[None, :]) + r_slopes[1][None, :]
            tl.store(dr_ptr + offsets, dr.to(dr_ptr.dtype.element_ty), mask=exists)


@triton.jit
def load_slopes(slopes_ptr, first_channel, channels, CUT: tl.constexpr):
    """B and D as two (block_c,); 0 without batch statistics."""
    if slopes_ptr is None:
        b = tl.full((CUT.block_c,), 0.0, CUT.acc)
        d = b
    else:
        b = load_channels(slopes_ptr, first_channel, channels, 0.0, CUT.acc, CUT.block_c)
        d = load_channels(slopes_ptr + channels, first_channel, channels, 0.0, CUT.acc, CUT.block_c)
    return b, d

"""The formula's one elementwise pass."""

import triton
import triton.language as tl

from fusedres.backends.triton.constants import load_affine, load_gate
from fusedres.backends.triton.epilogue import activation
from fusedres.backends.triton.masks import store_mask
from fusedres.backends.triton.tiles import inside, offsets_of, place_of


@triton.jit
def pre_activation(
    x,
    r_ptr,
    offsets,
    exists,
    place,
    x_affine,
    r_affine,
    gate_ptr,
    gate_strides,
    ACC: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """k * X + R of a tile whose x is loaded."""
    mean, scale, shift = x_affine
    z = (x - mean[None, :]) * scale[None, :] + shift[None, :]
    if gate_ptr is not None:
        z *= load_gate(gate_ptr, gate_strides, place, ACC, BLOCK_C)[None, :]
    if r_ptr is not None:
        mean_r, scale_r, shift_r = r_affine
        r = tl.load(r_ptr + offsets, mask=exists, other=0.0).to(ACC)
        z += (r - mean_r[None, :]) * scale_r[None, :] + shift_r[None, :]
    return z


@triton.jit(do_not_specialize=["tiles"])
def apply(
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
    y_ptr,
    mask_ptr,
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
    """y = act(k * ((x - mean) * scale + shift) + ((r - mean_r) * scale_r + shift_r)), and ReLU's sign as bits.

    x, r, y: (N, C, pixels) in either order. Reads x and r, writes y: 3 tensors, one pass, one rounding. Memory is
    walked backwards: the last that the statistics read is what the cache still holds.
    """
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    first_channel = program % channel_blocks * BLOCK_C
    x_affine = load_affine(x_centre_ptr, x_weight_ptr, x_bias_ptr, first_channel, channels, NORM_X, ACC, BLOCK_C)
    r_affine = load_affine(r_centre_ptr, r_weight_ptr, r_bias_ptr, first_channel, channels, NORM_R, ACC, BLOCK_C)

    for step in range(UNROLL):
        tile = program // channel_blocks * UNROLL + (UNROLL - 1 - step)
        place = place_of(tile, tiles, first_channel, pixels, channels, BLOCK_P)
        exists = inside(place, BLOCK_P, BLOCK_C)
        offsets = offsets_of(place, CHANNELS_LAST, BLOCK_P, BLOCK_C)
        x = tl.load(x_ptr + offsets, mask=exists, other=0.0).to(ACC)
        z = pre_activation(x, r_ptr, offsets, exists, place, x_affine, r_affine, gate_ptr, gate_strides, ACC, BLOCK_C)
        y = activation(z, ACT).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + offsets, y, mask=exists)
        if mask_ptr is not None:
            # Not y > 0: eager passes the gradient on at NaN.
            passes = (y.to(ACC) <= 0) == 0
            store_mask(mask_ptr, passes & exists, place, CHANNELS_LAST, BLOCK_P, BLOCK_C)

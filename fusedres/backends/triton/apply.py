"""The formula's one elementwise pass."""

# What is decorated is Triton's language, not Python.
# pyright: reportGeneralTypeIssues=false, reportInvalidTypeForm=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

from fusedres.backends.triton.constants import keep_statistics, load_affine, load_gate
from fusedres.backends.triton.epilogue import activation
from fusedres.backends.triton.masks import store_mask
from fusedres.backends.triton.tiles import inside, offsets_of, place_of, whole_rows


@triton.jit
def pre_activation(x_tile, r, gate, offsets, exists, place, x_affine, r_affine, CUT: tl.constexpr):
    """k * X + R of a tile whose x is loaded."""
    mean, scale, shift = x_affine
    z = (x_tile - mean[None, :]) * scale[None, :] + shift[None, :]
    if gate.data is not None:
        z *= load_gate(gate, place, CUT)[None, :]
    if r.data is not None:
        mean_r, scale_r, shift_r = r_affine
        r_tile = tl.load(r.data + offsets, mask=exists, other=0.0).to(CUT.acc)
        z += (r_tile - mean_r[None, :]) * scale_r[None, :] + shift_r[None, :]
    return z


@triton.jit(do_not_specialize=["tiles"])
def apply(
    x,
    r,
    gate,
    y_ptr,
    mask_ptr,
    eps: tl.float64,
    eps_r: tl.float64,
    pixels,
    channels,
    tiles,
    ACT: tl.constexpr,
    CUT: tl.constexpr,
):
    """y = act(k * ((x - mean) * scale + shift) + ((r - mean_r) * scale_r + shift_r)), and ReLU's sign as bits.

    x, r, y: (N, C, pixels) in either order. Reads x and r, writes y: 3 tensors, one pass, one rounding. Memory is
    walked backwards: the last that the statistics read is what the cache still holds.
    """
    pixels, channels = whole_rows(pixels, channels, CUT)
    channel_blocks = tl.cdiv(channels, CUT.block_c)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    first_channel = program % channel_blocks * CUT.block_c
    x_affine = load_affine(x, eps, first_channel, channels, CUT)
    r_affine = load_affine(r, eps_r, first_channel, channels, CUT)
    if program < channel_blocks:
        keep_statistics(x, eps, first_channel, channels, CUT)
        keep_statistics(r, eps_r, first_channel, channels, CUT)

    for step in range(CUT.unroll):
        tile = program // channel_blocks * CUT.unroll + (CUT.unroll - 1 - step)
        place = place_of(tile, tiles, first_channel, pixels, channels, CUT)
        exists = inside(place, CUT)
        offsets = offsets_of(place, CUT)
        x_tile = tl.load(x.data + offsets, mask=exists, other=0.0).to(CUT.acc)
        z = pre_activation(x_tile, r, gate, offsets, exists, place, x_affine, r_affine, CUT)
        y = activation(z, ACT).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + offsets, y, mask=exists)
        if mask_ptr is not None:
            # Not y > 0: eager passes the gradient on at NaN.
            passes = (y.to(CUT.acc) <= 0) == 0
            store_mask(mask_ptr, passes & exists, place, CUT)

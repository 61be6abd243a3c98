"""ReLU's sign, one bit an element, least significant first; every row begins on a byte.

A row is a pixel of channels_last or a plane of contiguous; see `fusedres.ops.kernels.empty_mask`.
"""

# What is decorated is Triton's language, not Python.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl


@triton.jit
def store_mask(mask_ptr, passes, place, CUT: tl.constexpr):
    """Keep a tile's (block_p, block_c) bits; those of elements that don't exist must be 0."""
    offsets, exists = _bytes_of(place, CUT)
    bits, bit = passes.to(tl.int32), tl.arange(0, 8)
    if CUT.channels_last:
        octets = tl.sum(tl.reshape(bits, (CUT.block_p, CUT.block_c // 8, 8)) << bit[None, None, :], axis=2)
    else:
        octets = tl.sum(tl.reshape(bits, (CUT.block_p // 8, 8, CUT.block_c)) << bit[None, :, None], axis=1)
    tl.store(mask_ptr + offsets, octets.to(tl.uint8), mask=exists)


@triton.jit
def load_mask(mask_ptr, place, CUT: tl.constexpr):
    """(block_p, block_c): the bits that `store_mask` kept."""
    offsets, exists = _bytes_of(place, CUT)
    octets, bit = tl.load(mask_ptr + offsets, mask=exists, other=0).to(tl.int32), tl.arange(0, 8)
    if CUT.channels_last:
        bits = octets[:, :, None] >> bit[None, None, :]
    else:
        bits = octets[:, None, :] >> bit[None, :, None]
    return tl.reshape(bits & 1, (CUT.block_p, CUT.block_c)) != 0


@triton.jit
def _bytes_of(place, CUT: tl.constexpr):
    """Where a tile's bytes are, and which of them exist: (block_p, block_c / 8) or (block_p / 8, block_c)."""
    image, first_pixel, first_channel, pixels, channels = place
    if CUT.channels_last:
        pixel, byte = tl.arange(0, CUT.block_p)[:, None], tl.arange(0, CUT.block_c // 8)[None, :]
        offsets = (image * pixels + first_pixel + pixel) * tl.cdiv(channels, 8) + first_channel // 8 + byte
        exists = (pixel < pixels - first_pixel) & (byte * 8 < channels - first_channel)
    else:
        byte, channel = tl.arange(0, CUT.block_p // 8)[:, None], tl.arange(0, CUT.block_c)[None, :]
        offsets = (image * channels + first_channel + channel) * tl.cdiv(pixels, 8) + first_pixel // 8 + byte
        exists = (byte * 8 < pixels - first_pixel) & (channel < channels - first_channel)
    return offsets, exists

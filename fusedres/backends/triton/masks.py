"""ReLU's sign, one bit an element, least significant first; every row begins on a byte.

A row is a pixel of channels_last or a plane of contiguous; see `fusedres.ops.kernels.empty_mask`.
"""

# What is decorated is Triton's language, not Python.
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl


@triton.jit
def store_mask(mask_ptr, passes, place, CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Keep a tile's (BLOCK_P, BLOCK_C) bits; those of elements that don't exist must be 0."""
    offsets, exists = _bytes_of(place, CHANNELS_LAST, BLOCK_P, BLOCK_C)
    bits, bit = passes.to(tl.int32), tl.arange(0, 8)
    if CHANNELS_LAST:
        octets = tl.sum(tl.reshape(bits, (BLOCK_P, BLOCK_C // 8, 8)) << bit[None, None, :], axis=2)
    else:
        octets = tl.sum(tl.reshape(bits, (BLOCK_P // 8, 8, BLOCK_C)) << bit[None, :, None], axis=1)
    tl.store(mask_ptr + offsets, octets.to(tl.uint8), mask=exists)


@triton.jit
def load_mask(mask_ptr, place, CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """(BLOCK_P, BLOCK_C): the bits that `store_mask` kept."""
    offsets, exists = _bytes_of(place, CHANNELS_LAST, BLOCK_P, BLOCK_C)
    octets, bit = tl.load(mask_ptr + offsets, mask=exists, other=0).to(tl.int32), tl.arange(0, 8)
    if CHANNELS_LAST:
        bits = octets[:, :, None] >> bit[None, None, :]
    else:
        bits = octets[:, None, :] >> bit[None, :, None]
    return tl.reshape(bits & 1, (BLOCK_P, BLOCK_C)) != 0


@triton.jit
def _bytes_of(place, CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Where a tile's bytes are, and which of them exist: (BLOCK_P, BLOCK_C / 8) or (BLOCK_P / 8, BLOCK_C)."""
    image, first_pixel, first_channel, pixels, channels = place
    if CHANNELS_LAST:
        pixel, byte = tl.arange(0, BLOCK_P)[:, None], tl.arange(0, BLOCK_C // 8)[None, :]
        offsets = (image * pixels + first_pixel + pixel) * tl.cdiv(channels, 8) + first_channel // 8 + byte
        exists = (pixel < pixels - first_pixel) & (byte * 8 < channels - first_channel)
    else:
        byte, channel = tl.arange(0, BLOCK_P // 8)[:, None], tl.arange(0, BLOCK_C)[None, :]
        offsets = (image * channels + first_channel + channel) * tl.cdiv(pixels, 8) + first_pixel // 8 + byte
        exists = (byte * 8 < pixels - first_pixel) & (channel < channels - first_channel)
    return offsets, exists

"""Where a tile of (BLOCK_P pixels, BLOCK_C channels) lies in memory, in either order.

channels_last is (images * pixels, channels) in memory, contiguous is (images, channels, pixels). A place is the tuple
(image, first_pixel, first_channel, pixels, channels). Offsets are int64: (4096, 64, 112, 112) passes 2^31.
"""

import triton
import triton.language as tl


@triton.jit
def place_of(tile, tiles, first_channel, pixels, channels, BLOCK_P: tl.constexpr):
    """The place of the tile-th tile, images one after the other; beyond the last, one without pixels in its image."""
    tiles_per_image = tl.cdiv(pixels, BLOCK_P)
    image = (tl.minimum(tile, tiles - 1) // tiles_per_image).to(tl.int64)
    first_pixel = (tile % tiles_per_image).to(tl.int64) * BLOCK_P
    return image, tl.where(tile < tiles, first_pixel, pixels), first_channel, pixels, channels


@triton.jit
def inside(place, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """(BLOCK_P, BLOCK_C): which elements exist."""
    _, first_pixel, first_channel, pixels, channels = place
    pixel = tl.arange(0, BLOCK_P) < pixels - first_pixel
    channel = tl.arange(0, BLOCK_C) < channels - first_channel
    return pixel[:, None] & channel[None, :]


@triton.jit
def offsets_of(place, CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """(BLOCK_P, BLOCK_C): where the elements are."""
    image, first_pixel, first_channel, pixels, channels = place
    pixel = tl.arange(0, BLOCK_P).to(tl.int64)[:, None]
    channel = tl.arange(0, BLOCK_C).to(tl.int64)[None, :]
    if CHANNELS_LAST:
        offsets = (image * pixels + first_pixel) * channels + first_channel + (pixel * channels + channel)
    else:
        offsets = (image * channels + first_channel) * pixels + first_pixel + (channel * pixels + pixel)
    return offsets

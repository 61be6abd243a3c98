"""Where a tile of (block_p pixels, block_c channels) lies in memory, in either order.

channels_last is (images * pixels, channels) in memory, contiguous is (images, channels, pixels). Offsets are int64:
(4096, 64, 112, 112) passes 2^31.
"""

# What is decorated is Triton's language, not Python.
# pyright: reportAttributeAccessIssue=false

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Place(NamedTuple):
    """A tile's first element, and what it is among."""

    image: Any
    first_pixel: Any
    first_channel: Any
    pixels: Any
    channels: Any


@triton.jit
def whole_rows(pixels, channels, CUT: tl.constexpr):
    """pixels and channels, for the compiler to see what divides a row; whether 16 does, it sees itself."""
    if CUT.row < 16:
        if CUT.channels_last:
            channels = channels // CUT.row * CUT.row
        else:
            pixels = pixels // CUT.row * CUT.row
    return pixels, channels


@triton.jit
def place_of(tile, tiles, first_channel, pixels, channels, CUT: tl.constexpr):
    """The place of the tile-th tile, images one after the other; beyond the last, one without pixels in its image."""
    tiles_per_image = tl.cdiv(pixels, CUT.block_p)
    image = (tl.minimum(tile, tiles - 1) // tiles_per_image).to(tl.int64)
    first_pixel = (tile % tiles_per_image).to(tl.int64) * CUT.block_p
    return Place(image, tl.where(tile < tiles, first_pixel, pixels), first_channel, pixels, channels)


@triton.jit
def inside(place, CUT: tl.constexpr):
    """(block_p, block_c): which elements exist."""
    pixel = tl.arange(0, CUT.block_p) < place.pixels - place.first_pixel
    channel = tl.arange(0, CUT.block_c) < place.channels - place.first_channel
    return pixel[:, None] & channel[None, :]


@triton.jit
def offsets_of(place, CUT: tl.constexpr):
    """(block_p, block_c): where the elements are."""
    image, first_pixel, first_channel, pixels, channels = place
    pixel = tl.arange(0, CUT.block_p).to(tl.int64)[:, None]
    channel = tl.arange(0, CUT.block_c).to(tl.int64)[None, :]
    if CUT.channels_last:
        offsets = (image * pixels + first_pixel) * channels + first_channel + (pixel * channels + channel)
    else:
        offsets = (image * channels + first_channel) * pixels + first_pixel + (channel * pixels + pixel)
    return offsets


@triton.jit
def offsets_at(pixel, place, pixels, CUT: tl.constexpr):
    """(block_p, block_c): where these pixels of the place's image and channels are in a tensor of so many pixels."""
    pixel = pixel.to(tl.int64)[:, None]
    channel = place.first_channel + tl.arange(0, CUT.block_c).to(tl.int64)[None, :]
    base = place.image * pixels * place.channels
    if CUT.channels_last:
        offsets = base + (pixel * place.channels + channel)
    else:
        offsets = base + (channel * pixels + pixel)
    return offsets

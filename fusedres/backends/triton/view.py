"""A tensor's memory as the kernels see it: images, pixels and channels in one of two orders."""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class View(NamedTuple):
    """(images * pixels, channels) in memory if `channels_last`, else (images, channels, pixels)."""

    images: int
    pixels: int
    channels: int
    channels_last: bool

    @staticmethod
    def of(t: Tensor) -> View:
        """Contiguous where it is both, as with one channel; planes of one pixel are rows of channels."""
        return View._of(t, _is_channels_last(t))

    @staticmethod
    def of_planes(t: Tensor) -> View:
        """The same, planes of one pixel being planes: what is pooled from them may have more."""
        images, channels, rows, columns = t.shape
        return View(images, rows * columns, channels, _is_channels_last(t))

    @staticmethod
    def of_backward(dy: Tensor, y: Tensor | None, mask: Tensor | None, *operands: Tensor | None) -> View:
        """What was saved tells the order; dy comes in any."""
        if mask is not None:
            return View._of(dy, mask.dim() == 2)
        return View.of(next((t for t in (y, *operands) if t is not None), dy))

    @staticmethod
    def _of(t: Tensor, channels_last: bool) -> View:
        images, channels = t.shape[:2]
        pixels = t.numel() // (images * channels)
        return View(images, pixels, channels, channels_last or pixels == 1)

    def merged(self) -> View:
        """The images as one where memory allows: for what has no value per image."""
        return self._replace(images=1, pixels=self.images * self.pixels) if self.channels_last else self

    def row_factor(self) -> int:
        """The largest power of 2, 16 at most, that divides the length of a row of memory."""
        return math.gcd(self.channels if self.channels_last else self.pixels, 16)

    def dense(self, t: Tensor) -> Tensor:
        """t in this order: itself, or a copy."""
        return t.contiguous(memory_format=self.memory_format(t))

    def empty_output(self, t: Tensor) -> Tensor:
        return torch.empty_like(t, memory_format=self.memory_format(t))

    def empty_mask(self, t: Tensor) -> Tensor:
        """One bit an element; every row, a pixel of channels_last or a plane of contiguous, begins on a byte."""
        images, pixels, channels, channels_last = self
        shape = (images * pixels, -(-channels // 8)) if channels_last else (images, channels, -(-pixels // 8))
        return t.new_empty(shape, dtype=torch.uint8)

    def memory_format(self, t: Tensor) -> torch.memory_format:
        return CHANNELS_LAST[t.dim()] if self.channels_last and self.pixels > 1 else torch.contiguous_format


def _is_channels_last(t: Tensor) -> bool:
    """Of what backends take, and for any other dy what eager would choose."""
    if t.is_contiguous():
        return False
    order = CHANNELS_LAST.get(t.dim())
    if order is not None and t.is_contiguous(memory_format=order):
        return True
    return suggest_memory_format(t) in CHANNELS_LAST.values()


@cache
def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)

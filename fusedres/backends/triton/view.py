"""A tensor's memory as the kernels see it: images, pixels and channels in one of two orders."""

from __future__ import annotations

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
        return View._of(t, not t.is_contiguous() and suggest_memory_format(t) in CHANNELS_LAST.values())

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

    def dense(self, t: Tensor) -> Tensor:
        """t in this order: itself, or a copy."""
        return t.contiguous(memory_format=self._memory_format(t))

    def empty_output(self, t: Tensor) -> Tensor:
        return torch.empty_like(t, memory_format=self._memory_format(t))

    def empty_mask(self, t: Tensor) -> Tensor:
        """One bit an element; every row, a pixel of channels_last or a plane of contiguous, begins on a byte."""
        images, pixels, channels, channels_last = self
        shape = (images * pixels, -(-channels // 8)) if channels_last else (images, channels, -(-pixels // 8))
        return t.new_empty(shape, dtype=torch.uint8)

    def _memory_format(self, t: Tensor) -> torch.memory_format:
        return CHANNELS_LAST[t.dim()] if self.channels_last and self.pixels > 1 else torch.contiguous_format


def accumulation_dtype(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)

"""Where intermediate results lie: one piece of memory that every call of a plan writes to again.

Results whose lives do not meet share a place. Nothing of it is ever shown to who calls the model: only the plan's own
operations write it and read it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

_ALIGNMENT = 64


class Likeness(NamedTuple):
    """What a plan rests on of a tensor."""

    shape: torch.Size
    dtype: torch.dtype

    @staticmethod
    def of(t: Tensor) -> Likeness:
        return Likeness(t.shape, t.dtype)

    @property
    def bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


class Life(NamedTuple):
    """Some bytes, and the first and the last step that need them."""

    key: int
    bytes: int
    begin: int
    end: int


def places(lives: Iterable[Life]) -> tuple[Mapping[int, int], int]:
    """Where each of them begins, and the bytes in all: the largest first, each as low as those it meets allow."""
    placed: list[tuple[int, Life]] = []
    for life in sorted(lives, key=lambda life: (-life.bytes, life.begin)):
        at = 0
        for begin, other in sorted(placed, key=lambda pair: pair[0]):
            meet = other.begin <= life.end and life.begin <= other.end
            if meet and begin < at + life.bytes:
                at = max(at, -(-(begin + other.bytes) // _ALIGNMENT) * _ALIGNMENT)
        placed.append((at, life))
    return {life.key: at for at, life in placed}, max((at + life.bytes for at, life in placed), default=0)


def memory(size: int) -> Tensor:
    """Bytes that calls in inference mode and outside of it may write to, in pages that are there."""
    with torch.inference_mode(False):
        return torch.zeros(size, dtype=torch.uint8)


def view(memory: Tensor, at: int, like: Likeness) -> Tensor:
    """A tensor in channels_last that lies there."""
    images, channels, height, width = like.shape
    with torch.inference_mode(False):
        values = memory[at : at + like.bytes].view(like.dtype)
        return values.view(images, height, width, channels).permute(0, 3, 1, 2)

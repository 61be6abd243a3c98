"""What the kernels take beside pointers: operands, the gate, and how memory is cut, each as one argument.

Triton compiles a tuple's members as if they were arguments of their own; an absent one costs nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Operand(NamedTuple):
    """A tensor and its per-channel map (t - mean) * scale + shift; what is absent is left out.

    mean, weight and bias are the map. With var they are a norm's with its running statistics, and stats is where the
    kernel leaves what it used. stats without var, (3, C), are statistics found before: the mean's high part, its
    remainder and 1 / sqrt(var + eps).
    """

    data: Tensor | None = None
    mean: Tensor | None = None  # (C,)
    var: Tensor | None = None  # (C,)
    stats: Tensor | None = None  # (3, C)
    weight: Tensor | None = None  # (C,)
    bias: Tensor | None = None  # (C,)

    @staticmethod
    def of_norm(data: Tensor | None, weight: Tensor | None, bias: Tensor | None, stats: Tensor) -> Operand:
        """By statistics that were found before; without any there is no norm."""
        return Operand(data, stats=stats, weight=weight, bias=bias) if stats.numel() else Operand(data)


class Gate(NamedTuple):
    """k, and its steps from image to image and from channel to channel; 0 where it has one value for all."""

    data: Tensor | None
    image_stride: int
    channel_stride: int

    @staticmethod
    def of(gate: Tensor | None) -> Gate:
        if gate is None:
            return Gate(None, 0, 0)
        image, channel = (gate.stride(d) if gate.shape[d] > 1 else 0 for d in (0, 1))
        return Gate(gate, image, channel)

    def per_image(self) -> bool:
        return self.data is not None and self.data.shape[0] > 1


class Slope(NamedTuple):
    """dy, and what tells act'(z): the mask, y, or where both are absent z computed again."""

    dy: Tensor
    y: Tensor | None = None
    mask: Tensor | None = None


class Cut(NamedTuple):
    """How a pass goes through memory; members are tl.constexpr, so that kernels may use them as literals.

    Args:
        channels_last: whether channels are innermost.
        acc: what is computed in.
        block_p, block_c: pixels and channels of a tile.
        unroll: tiles that a program handles together.
        row: what divides the length of a row of memory: 16, or the largest power of 2 below.
    """

    channels_last: Any
    acc: Any
    block_p: Any
    block_c: Any
    unroll: Any
    row: Any

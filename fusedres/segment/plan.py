"""What a segment's function is told, and what it saves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from fusedres import dispatch
from fusedres.backends import Geometry, Norm, Request, TrainingConvolution, reference
from fusedres.epilogue import Activation
from fusedres.memory import Memory
from fusedres.ops import kernels

NO_NORM = Norm(None, None, None, None, False, 0.0, 0.0)  # of a convolution alone


class Step(NamedTuple):
    """One conv -> norm -> act of a call."""

    weight: Tensor
    bias: Tensor | None
    geometry: Geometry
    norm: Norm
    act: Activation
    convolution: TrainingConvolution = reference.TRAINING_CONVOLUTION
    chosen: tuple[Any, ...] = ()  # what the convolution's functions are told

    def output_sizes(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        channels, _, *kernel = self.weight.shape
        return sizes[0], channels, *self.geometry.output_size((kernel[0], kernel[1]), *sizes[2:])

    def weight_for(self, dtype: torch.dtype) -> Tensor:
        """What convolves an x of this dtype."""
        rounded = self.convolution.rounds and self.weight.dtype is torch.float32
        return self.weight if rounded else self.weight.to(dtype)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        bias = None if bias is None else bias.to(x.dtype)
        return self.convolution.forward(x, weight, bias, self.geometry, *self.chosen)


def convolved(steps: list[Step], requests: Sequence[Request]) -> list[Step]:
    """With the convolutions of those whom the dispatcher names."""
    found = map(dispatch.convolving, requests)
    return [step._replace(convolution=f.convolution, chosen=f.chosen) for step, f in zip(steps, found, strict=True)]


class Plan(NamedTuple):
    """What the function does in one call.

    Args:
        chain: the steps from x to the output.
        operators: of their norms.
        joins: whether a shortcut is added at the chain's end.
        projection: the step that the shortcut goes through.
        dtype: what the convolutions compute in.
        memory: what is kept.
    """

    chain: list[Step]
    operators: Sequence[kernels.Operators]
    joins: bool
    projection: Step | None
    dtype: torch.dtype
    memory: Memory

    @property
    def steps(self) -> list[Step]:
        """The projection last."""
        return self.chain if self.projection is None else [*self.chain, self.projection]

    @property
    def parameters(self) -> list[Tensor | None]:
        return [t for step in self.steps for t in (step.weight, step.bias, step.norm.weight, step.norm.bias)]


class Kept(NamedTuple):
    """What is saved of a step: its arguments, and what came up in the forward."""

    weight: Tensor
    bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    cast_weight: Tensor | None  # what convolved, where that is another tensor
    entering: Tensor | None  # what was convolved, between two steps
    output: Tensor | None  # what was normalised
    stats: Tensor  # (3, C)

    def computed_weight(self) -> Tensor:
        return self.weight if self.cast_weight is None else self.cast_weight

    def without_values(self) -> Kept:
        """Nothing of what came up in the forward, which may then be freed."""
        return self._replace(cast_weight=None, entering=None, output=None)


FIRST, ARGUMENTS = 2, 4  # where the steps' arguments begin after x and the shortcut; how many are a step's


def in_layout_of(output: Tensor, residual: Tensor) -> Tensor:
    """A convolution may choose a layout of its own, as aten's fp64 ones on the CPU do."""
    if residual.stride() == output.stride() or dispatch.layout(residual) == dispatch.layout(output):
        return residual
    return residual.contiguous(memory_format=suggest_memory_format(output))


def is_dropped(plan: Plan, weight: Tensor) -> bool:
    """Whether the output of a convolution at the end is computed again rather than kept."""
    return plan.memory is Memory.MIN and plan.joins and weight.shape[2:] == (1, 1)

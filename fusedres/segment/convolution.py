"""A convolution of a training step that is in no segment, as an autograd function of its own: the stem's before its
pool, or the last one before a squeeze-and-excitation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedres.backends import reference
from fusedres.ops import gradients
from fusedres.segment.plan import Step


class ConvolutionFunction(torch.autograd.Function):
    """Takes the step, of which it is the convolution alone, the dtype that computes, x, the weight and the bias."""

    @staticmethod
    def forward(ctx: Any, step: Step, dtype: torch.dtype, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        cast, computed = x.to(dtype), step.weight_for(dtype)
        ctx.step, ctx.dtype = step, dtype
        ctx.save_for_backward(
            x if cast is x or ctx.needs_input_grad[2] else None,  # otherwise what it was cast to will do
            None if cast is x else cast,
            weight,
            None if computed is weight else computed,
            bias,
        )
        return step.convolve(cast, computed, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        step, needs = ctx.step, ctx.needs_input_grad[2:]
        x, cast, weight, computed, bias = ctx.saved_tensors
        x, cast = (cast, cast) if x is None else (x, x if cast is None else cast)
        operands = x, weight, bias
        if torch.is_grad_enabled():
            return None, None, *_backward_again(step, ctx.dtype, operands, needs, dy)
        computed = weight if computed is None else computed
        found = step.convolution.backward(dy, cast, computed, step.geometry, needs, None, False, *step.chosen)
        cast_back = (
            None if gradient is None or t is None else gradients.cast(gradient, t.dtype)
            for gradient, t in zip(found, operands, strict=True)
        )
        return None, None, *cast_back


def apply(step: Step, dtype: torch.dtype, x: Tensor) -> Tensor:
    """The step's convolution of x, computed in a dtype."""
    if step.convolution is reference.TRAINING_CONVOLUTION:
        return _formula(step, dtype, x, step.weight, step.bias)
    return ConvolutionFunction.apply(step, dtype, x, step.weight, step.bias)


def _formula(step: Step, dtype: torch.dtype, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.to(dtype)
    return reference.conv_forward(x.to(dtype), weight.to(dtype), bias, step.geometry)


def _backward_again(
    step: Step, dtype: torch.dtype, operands: Sequence[Tensor | None], needs: Sequence[bool], dy: Tensor
) -> list[Tensor | None]:
    """create_graph: the convolution rerun by aten, which can be differentiated again."""
    with torch.autocast(dy.device.type, enabled=False):
        return gradients.differentiable(lambda *given: _formula(step, dtype, *given), operands, needs, dy)

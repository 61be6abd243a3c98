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
        cast = x.to(dtype)
        ctx.step, ctx.dtype = step, dtype
        kept = x if cast is x or ctx.needs_input_grad[2] else None  # otherwise what it was cast to will do
        ctx.save_for_backward(kept, None if cast is x else cast, weight, bias)
        return step.convolve(cast, step.weight_for(dtype), bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        step, needs = ctx.step, ctx.needs_input_grad[2:]
        x, cast, weight, bias = ctx.saved_tensors
        x, cast = (cast, cast) if x is None else (x, x if cast is None else cast)
        if torch.is_grad_enabled():
            return None, None, *_backward_again(step, ctx.dtype, (x, weight, bias), needs, dy)
        weight = step._replace(weight=weight).weight_for(ctx.dtype)  # as it was saved
        found = step.convolution.backward(dy, cast, weight, step.geometry, needs, None, False, *step.chosen)
        return None, None, *found  # which autograd converts to the operands' dtypes


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

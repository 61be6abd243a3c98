"""A segment as one autograd function, of the backends' batch-norm kernels and aten's convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _autograd
from torch.autograd.function import once_differentiable

from fusedres.epilogue import IDENTITY
from fusedres.memory import Memory
from fusedres.ops import gradients, kernels
from fusedres.ops.bn_act import arguments_of, moved_by
from fusedres.segment.backward import Backward, backward_again
from fusedres.segment.plan import ARGUMENTS, FIRST, Kept, Plan, Step, in_layout_of, is_dropped


class SegmentFunction(torch.autograd.Function):
    """Takes the plan, x, the shortcut where it is another tensor, and each step's parameters, the projection's last."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, x: Tensor, shortcut: Tensor | None, *parameters: Any) -> Tensor:
        needs, end = ctx.needs_input_grad[1:], len(plan.chain) - 1
        cast = x.to(plan.dtype)
        source = cast if shortcut is None else shortcut
        kept: list[Tensor | None] = []
        y, mask = cast, kernels.nothing(x)
        for index, (step, operators) in enumerate(zip(plan.chain, plan.operators, strict=True)):
            entering, weight = y, step.weight_for(plan.dtype)
            output = step.convolve(entering, weight, step.bias)
            if not plan.joins or index < end:
                y, stats, *_ = _normalise(operators, step, output, None, None)
                kept += _kept(plan, needs, index, step, weight, entering, output, stats)
                continue
            projection, residual, weight_r = plan.projection, source, None
            if projection is not None:
                source, weight_r = source.to(plan.dtype), projection.weight_for(plan.dtype)
                residual = projection.convolve(source, weight_r, projection.bias)
            y, stats, stats_r, mask = _normalise(operators, step, output, residual, projection)
            kept += _kept(plan, needs, index, step, weight, entering, output, stats)
            if projection is not None and weight_r is not None:
                kept += _kept(plan, needs, index + 1, projection, weight_r, source, residual, stats_r)

        ctx.plan = plan
        # Hooks may hold what is saved.
        ctx.is_hooked = _autograd._top_saved_tensors_default_hooks(True) is not None
        act = plan.chain[-1].act
        has_mask = mask.numel() > 0
        ctx.save_for_backward(
            x if cast is x or needs[0] else None,  # otherwise what it was cast to will do
            shortcut,
            None if cast is x else cast,
            None if source is cast or source is shortcut else source,
            None if has_mask or act is IDENTITY or not act.from_output else y,
            mask if has_mask else None,
            *kept,
        )
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        plan, needs = ctx.plan, ctx.needs_input_grad[1:]
        x, shortcut, cast, source, y, mask, *kept = ctx.saved_tensors
        x, cast = (cast, cast) if x is None else (x, x if cast is None else cast)
        links = [Kept(*kept[at : at + len(Kept._fields)]) for at in range(0, len(kept), len(Kept._fields))]
        if torch.is_grad_enabled():
            arguments = [x, shortcut, *(t for link in links for t in link[:ARGUMENTS])]
            return None, *backward_again(plan, links, arguments, needs, dy)
        ctx.maybe_clear_saved_tensors()  # unless the graph is retained: the walk frees what it is done with
        del kept
        if source is None:
            source = cast if shortcut is None else shortcut
        walk = Backward(plan, cast, source, shortcut is None, y, mask, links, needs, _is_owned(ctx))
        del y, mask
        dx, d_shortcut, *found = walk.run(dy)
        dx = dx if dx is None else gradients.cast(dx, x.dtype)
        if d_shortcut is not None and shortcut is not None:
            d_shortcut = gradients.cast(d_shortcut, shortcut.dtype)
        return None, dx, d_shortcut, *found


def _is_owned(ctx: Any) -> bool:
    """Whether nobody else will ever read what came up in the forward and was saved."""
    if torch.compiler.is_compiling() or ctx.is_hooked:
        return False
    return not _autograd._get_current_graph_task_keep_graph()


def apply(plan: Plan, x: Tensor, shortcut: Tensor | None, function: type = SegmentFunction) -> Tensor:
    """The function of a plan on x, and on the shortcut where that is another tensor."""
    y = function.apply(plan, x, shortcut, *plan.parameters)
    if not torch.compiler.is_compiling():  # a compiled graph writes the statistics back itself
        torch.autograd.graph.increment_version(moved_by(*(step.norm for step in plan.steps)))
    return y


class SyncSegmentFunction(SegmentFunction):
    """With statistics of a process group, of which only the first derivatives are known."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return SegmentFunction.backward(ctx, dy)


def _normalise(
    operators: kernels.Operators, step: Step, output: Tensor, residual: Tensor | None, projection: Step | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, stats, stats_r, mask)"""
    if residual is not None:
        residual = in_layout_of(output, residual)
    norm_r = None if projection is None else projection.norm
    arguments = arguments_of(output, step.norm, residual, norm_r, None, step.act)
    return operators.forward(*arguments, kernels.keeps_mask(step.act, residual))


def _kept(
    plan: Plan,
    needs: Sequence[bool],
    index: int,
    step: Step,
    weight: Tensor,
    entering: Tensor,
    output: Tensor,
    stats: Tensor,
) -> list[Tensor | None]:
    """A step's tensors, without those that nobody wants or the policy computes again."""
    end = len(plan.chain) - 1
    again = plan.memory is not Memory.FAST
    wanted = step.norm.training or needs[FIRST + ARGUMENTS * index + 2] or not plan.chain[-1].act.from_output
    if index < end:
        wanted = wanted or again or not step.act.from_output
    elif is_dropped(plan, weight):
        wanted = False
    return [
        step.weight,
        step.bias,
        step.norm.weight,
        step.norm.bias,
        None if weight is step.weight else weight,
        None if again or index in (0, end + 1) else entering,
        output if wanted else None,
        stats,
    ]

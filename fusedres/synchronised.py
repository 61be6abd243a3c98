"""Batch norms whose statistics are those of a whole process group, by the ops' kernels.

    forward   gather every process's mean, variance and count, merge them; then one pass of affine_act
    backward  one pass of bn_act's backward with the statistics held fixed; sum dweight and dbias over the group; then
              dx += B * (x - mean) + D,  B = -A * rstd * dweight / M,  D = -A * dbias / M,  A = weight * rstd

One small collective each way, for both norms of a projection block together. torch's own norm refuses CPU tensors; this
one takes them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fusedres import dispatch
from fusedres.backends import Norm, Statistics
from fusedres.epilogue import IDENTITY, Activation
from fusedres.modules import count_batch, norm_of
from fusedres.ops import contract, gradients, kernels


def group_of(norm: nn.Module | None) -> Any:
    """The process group that a norm would synchronise with in this call, or None."""
    if type(norm) is not nn.SyncBatchNorm or not norm.training:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def bn_act(
    x: Tensor,
    norm: Any,
    residual: Tensor | None,
    residual_norm: Any,
    gate: Tensor | None,
    act: Activation,
    group: Any,
) -> Tensor | None:
    """`ops.bn_act` on modules, both norms over the group; None where no kernels serve it."""
    if torch.compiler.is_compiling():
        return None
    members = [Norm(m.weight, m.bias, m.running_mean, m.running_var) for m in (norm, residual_norm) if m is not None]
    request = contract.request("bn_act", x, residual, gate, act, contract.parameter_dtype(*members), _RUNNING)
    # A share without images goes the others' way.
    request = request._replace(empty=False, residual_statistics=_RUNNING if residual_norm is not None else _ABSENT)
    backend = dispatch.choose(request)
    if backend.plain:
        return None
    count_batch(norm)
    count_batch(residual_norm)
    operators = kernels.of(backend, "affine_act"), kernels.of(backend, "bn_act")
    plan = _Plan(*operators, norm_of(norm), None if residual_norm is None else norm_of(residual_norm), act, group)
    parameters_r = (None, None) if plan.residual_norm is None else plan.residual_norm[:2]
    y = _SyncBnAct.apply(plan, x, *plan.norm[:2], residual, *parameters_r, gate)
    return y  # pyright: ignore[reportReturnType]


_ABSENT, _RUNNING = Statistics.ABSENT.value, Statistics.RUNNING.value


class _Plan(NamedTuple):
    affine_act: kernels.Kernels
    bn_act: kernels.Kernels
    norm: Norm
    residual_norm: Norm | None
    act: Activation
    group: Any


class _Moments(NamedTuple):
    """Of each channel over the group, in fp64, and the number of values they are of."""

    mean: Tensor  # (C,)
    var: Tensor  # (C,), biased
    count: Tensor  # (1,)


class _SyncBnAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, *tensors: Any) -> Tensor:
        x, weight, bias, residual, weight_r, bias_r, gate = tensors
        moments = _gather([x] if plan.residual_norm is None else [x, residual], plan.group)
        stats, stats_r = _settle(x, plan.norm, moments[0]), kernels.nothing(x)
        shortcut = (None, None, None)
        if plan.residual_norm is not None:
            stats_r = _settle(x, plan.residual_norm, moments[1])
            shortcut = gradients.affine_of(stats_r, weight_r, bias_r)
        if x.numel():
            affine = gradients.affine_of(stats, weight, bias)
            keeps_mask = kernels.keeps_mask(plan.act, residual)
            y, mask = plan.affine_act.forward(x, *affine, residual, *shortcut, gate, plan.act.code, keeps_mask)
        else:
            y, mask = kernels.empty_output(x), kernels.nothing(x)
        slope_from_y = plan.act.from_output and plan.act is not IDENTITY and not mask.numel()
        ctx.plan, ctx.count = plan, moments[0].count
        ctx.save_for_backward(y if slope_from_y else None, mask if mask.numel() else None, *tensors, stats, stats_r)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        y, mask, x, weight, bias, residual, weight_r, bias_r, gate, stats, stats_r = ctx.saved_tensors
        plan, needs = ctx.plan, ctx.needs_input_grad[1:]
        normalises = plan.residual_norm is not None
        need_x, need_r, need_gate = needs[0], needs[3], needs[6]
        wanted = [need_x, True, True, need_r, normalises, normalises, need_gate]
        branch, shortcut = (weight, bias, stats), (weight_r, bias_r, stats_r)
        if x.numel():
            sources = _RUNNING, _RUNNING if normalises else _ABSENT
            dx, dweight, dbias, dr, dweight_r, dbias_r, dgate = plan.bn_act.backward(
                dy, y, mask, x, *branch, residual, *shortcut, gate, *sources, plan.act.code, wanted
            )
        else:
            dx, dr, dgate = torch.empty_like(x), dy, None if gate is None else torch.zeros_like(gate)
            dweight, dbias = torch.zeros_like(stats[0]), torch.zeros_like(stats[0])
            dweight_r, dbias_r = torch.zeros_like(stats_r[:1].flatten()), torch.zeros_like(stats_r[:1].flatten())
        sums = torch.stack([dweight, dbias, dweight_r, dbias_r] if normalises else [dweight, dbias]).double()
        dist.all_reduce(sums, group=plan.group)
        if need_x and x.numel():
            dx = _correct(plan, dx, x, weight, stats, *sums[:2] / ctx.count)
        if need_r and normalises and x.numel():
            dr = _correct(plan, dr, residual, weight_r, stats_r, *sums[2:] / ctx.count)
        found = [dx, dweight, dbias, dr, dweight_r, dbias_r, dgate]
        return None, *[
            gradients.cast(d, t.dtype) if needed and t is not None else None
            for d, t, needed in zip(found, (x, weight, bias, residual, weight_r, bias_r, gate), needs, strict=True)
        ]


def _gather(operands: list[Tensor], group: Any) -> list[_Moments]:
    """The operands' moments over the group, by Chan's merge in the order of ranks."""
    mine = []
    for t in operands:
        values = t.numel() // t.shape[1]
        if values:
            wide = t.to(torch.promote_types(t.dtype, torch.float32))
            var, mean = torch.var_mean(wide, [d for d in range(t.dim()) if d != 1], correction=0)
        else:
            var = mean = t.new_zeros(t.shape[1])
        mine += [mean.double(), var.double(), mean.new_full((1,), values, dtype=torch.float64)]
    sizes, packed = [t.numel() for t in mine], torch.cat(mine)
    everyones = [torch.empty_like(packed) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyones, packed, group)
    found = []
    for at in range(0, len(sizes), 3):
        mean = m2 = count = torch.zeros_like(packed[:1])
        for whole in everyones:
            other_mean, other_var, other = whole.split(sizes)[at : at + 3]
            total, delta = (count + other).clamp(min=1), other_mean - mean
            m2 = m2 + other_var * other + delta.square() * (count * other / total)
            mean, count = mean + delta * (other / total), count + other
        found.append(_Moments(mean, m2 / count, count))
    return found


def _settle(x: Tensor, norm: Norm, moments: _Moments) -> Tensor:
    """(3, C) as kernels have it; the running statistics move."""
    mean, var, count = moments
    dtype = kernels.accumulation_dtype(x)
    unbiased = var * (count / (count - 1))
    for running, now in ((norm.running_mean, mean), (norm.running_var, unbiased)):
        if running is not None:
            running.copy_(running.double() * (1 - norm.momentum) + now * norm.momentum)
    high = mean.to(dtype)
    return torch.stack([high, (mean - high).to(dtype), (var + norm.eps).rsqrt().to(dtype)])


def _correct(
    plan: _Plan, dx: Tensor, t: Tensor, weight: Tensor | None, stats: Tensor, dweight: Tensor, dbias: Tensor
) -> Tensor:
    """What the statistics' dependence on the batch adds to dx."""
    mean, low, rstd = stats
    scale = rstd.double() if weight is None else rstd.double() * weight
    b, d = -scale * rstd * dweight, -scale * dbias
    affine = b.to(rstd.dtype), (d - b * low).to(rstd.dtype), mean
    return plan.affine_act.forward(t, *affine, dx, None, None, None, None, IDENTITY.code, False)[0]

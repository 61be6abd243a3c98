"""A backend whose kernels are Python: it proves the seam that native ones use, and states both passes explicitly.

    forward   z = k * X + R,  X = (x - mean) * rstd * weight + bias,  R the same of r;  y = act(z)
    backward  g = act'(z) * dy,  gx = k * g:
              dbias = sum gx,  dweight = sum gx * xhat,
              dx = A * gx + B * (x - mean) + D,  A = weight * rstd,  B = -A * rstd * dweight / M,  D = -A * dbias / M

Everything is computed in fp64 and rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from fusedres import ops
from fusedres.backends import Backend, Request, Statistics, Window
from fusedres.epilogue import CATALOGUE, Activation
from fusedres.ops import kernels
from fusedres.ops.bn_act_pool import PASSES_NOTHING, chosen_pixel


class Branch(NamedTuple):
    """One operand in fp64 with what normalises it; rstd = 1 and mean = 0 for what is absent."""

    value: Tensor  # (N, C, ...)
    mean: Tensor  # (C,)
    rstd: Tensor  # (C,)
    weight: Tensor  # (C,)
    bias: Tensor  # (C,)

    def centred(self) -> Tensor:
        return self.value - per_channel(self.mean, self.value)

    def affine(self) -> Tensor:
        return self.centred() * per_channel(self.rstd * self.weight, self.value) + per_channel(self.bias, self.value)


def per_channel(t: Tensor, like: Tensor) -> Tensor:
    return t.view(1, -1, *[1] * (like.dim() - 2))


def channel_sum(t: Tensor) -> Tensor:
    return t.sum([d for d in range(t.dim()) if d != 1])


def branch(
    value: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, rstd: Tensor | None
) -> Branch:
    value = value.double()
    zero, one = value.new_zeros(value.shape[1]), value.new_ones(value.shape[1])
    given = [
        default if t is None else t.double() for t, default in ((mean, zero), (rstd, one), (weight, one), (bias, zero))
    ]
    return Branch(value, *given)


def statistics_branch(value: Tensor, weight: Tensor | None, bias: Tensor | None, stats: Tensor) -> Branch:
    if not stats.numel():
        return branch(value, None, None, None, None)
    high, low, rstd = stats.double()
    return branch(value, weight, bias, high + low, rstd)


def batch_statistics(x, running_mean, running_var, source: int, momentum: float, eps: float) -> Tensor:
    """(3, C) as the schema has it; the running statistics move in training."""
    dtype = kernels.accumulation_dtype(x)
    if source == Statistics.ABSENT:
        return x.new_empty(0, dtype=dtype)
    if source == Statistics.RUNNING:
        mean, var = running_mean.double(), running_var.double()
    else:
        values = x.numel() // x.shape[1]
        mean = channel_sum(x.double()) / values
        var = channel_sum((x.double() - per_channel(mean, x)) ** 2) / values
        if running_mean is not None:
            running_mean.copy_(running_mean.double() * (1 - momentum) + mean * momentum)
        if running_var is not None:
            unbiased = var * values / (values - 1)
            running_var.copy_(running_var.double() * (1 - momentum) + unbiased * momentum)
    high = mean.to(dtype)
    return torch.stack([high, (mean - high).to(dtype), (var + eps).rsqrt().to(dtype)])


def join(x: Branch, residual: Branch | None, gate: Tensor | None) -> Tensor:
    z = x.affine() if gate is None else gate.double() * x.affine()
    return z if residual is None else z + residual.affine()


def write_output(x: Tensor, z: Tensor, act: Activation, keep_mask: bool) -> tuple[Tensor, Tensor]:
    y = kernels.empty_output(x)
    y.copy_(act.formula(z))
    mask = kernels.empty_mask(y, keep_mask)
    if mask.numel():
        passes = act.derivative(y)
        rows = (passes.movedim(1, -1) if mask.dim() == 2 else passes).reshape(*mask.shape[:-1], -1)
        padded = torch.nn.functional.pad(rows, (0, 8 * mask.shape[-1] - rows.shape[-1])).unflatten(-1, (-1, 8))
        mask.copy_((padded.long() << torch.arange(8, device=y.device)).sum(-1))
    return y, mask


def unpack(mask: Tensor, dy: Tensor) -> Tensor:
    bits = (mask[..., None].long() >> torch.arange(8, device=dy.device) & 1).bool().flatten(-2)
    n, c, *pixels = dy.shape
    if mask.dim() == 2:
        return bits[:, :c].reshape(n, *pixels, c).movedim(-1, 1)
    return bits[..., : dy.numel() // (n * c)].reshape(dy.shape)


def affine_act_forward(x, scale, bias, mean, residual, scale_r, bias_r, mean_r, gate, act, keep_mask):
    shortcut = None if residual is None else branch(residual, scale_r, bias_r, mean_r, None)
    return write_output(x, join(branch(x, scale, bias, mean, None), shortcut, gate), CATALOGUE[act], keep_mask)


def bn_act_forward(
    x, weight, bias, mean, var, residual, weight_r, bias_r, mean_r, var_r, gate,
    source, source_r, momentum, momentum_r, eps, eps_r, act, keep_mask,
):  # fmt: skip
    stats = batch_statistics(x, mean, var, source, momentum, eps)
    stats_r = batch_statistics(x if residual is None else residual, mean_r, var_r, source_r, momentum_r, eps_r)
    shortcut = None if residual is None else statistics_branch(residual, weight_r, bias_r, stats_r)
    z = join(statistics_branch(x, weight, bias, stats), shortcut, gate)
    y, mask = write_output(x, z, CATALOGUE[act], keep_mask)
    return y, stats, stats_r, mask


def branch_backward(g: Tensor, operand: Branch, from_batch: bool) -> tuple[Tensor, Tensor, Tensor]:
    dbias = channel_sum(g)
    dweight = channel_sum(g * operand.centred()) * operand.rstd
    a = operand.weight * operand.rstd
    dx = per_channel(a, g) * g
    if from_batch:
        values = g.numel() // g.shape[1]
        b, d = -a * operand.rstd * dweight / values, -a * dbias / values
        dx = dx + per_channel(b, g) * operand.centred() + per_channel(d, g)
    return dx, dweight, dbias


def backward(dy, y, mask, x: Branch, residual: Branch, gate, from_batch, act: Activation, needs) -> list[Tensor]:
    if mask is not None:
        slope = unpack(mask, dy)
    elif not act.from_output:
        slope = act.derivative(join(x, residual, gate))
    else:
        slope = None if y is None else act.derivative(y.double())
    wide = dy.double()
    g = wide if slope is None else torch.where(slope, wide, 0.0) if slope.dtype == torch.bool else wide * slope
    dx, dweight, dbias = branch_backward(g if gate is None else g * gate.double(), x, from_batch[0])
    dr, dweight_r, dbias_r = branch_backward(g, residual, from_batch[1])
    dgate = dy.new_empty(0) if gate is None else (g * x.affine()).sum_to_size(gate.shape)
    found = [dx, dweight, dbias, dr, dweight_r, dbias_r, dgate]
    dtype = kernels.accumulation_dtype(dy)
    results = []
    for index, (d, needed) in enumerate(zip(found, needs, strict=True)):
        if not needed:
            results.append(kernels.nothing(dy))
        elif index in (0, 3):
            results.append(d)
        else:
            results.append(d.to(dtype))
    return results


def dense(found: list[Tensor], dy, y, mask, x, residual) -> tuple[Tensor, ...]:
    """dx and dr in the forward's order."""
    memory_format = kernels.gradient_format(dy, y, mask, x, residual)
    for index, operand in ((0, x), (3, residual)):
        if found[index].numel():
            like = dy if operand is None else operand
            found[index] = torch.empty_like(like, memory_format=memory_format).copy_(found[index])
    return tuple(found)


def affine_act_backward(dy, y, mask, x, scale, bias, mean, residual, scale_r, bias_r, mean_r, gate, act, needs):
    zeros = torch.zeros_like(dy)
    branches = (
        branch(zeros if x is None else x, scale, bias, mean, None),
        branch(zeros if residual is None else residual, scale_r, bias_r, mean_r, None),
    )
    found = backward(dy, y, mask, *branches, gate, (False, False), CATALOGUE[act], needs)
    return dense(found, dy, y, mask, x, residual)


def bn_act_backward(
    dy,
    y,
    mask,
    x,
    weight,
    bias,
    stats,
    residual,
    weight_r,
    bias_r,
    stats_r,
    gate,
    source,
    source_r,
    act,
    needs,
):
    zeros = torch.zeros_like(dy)
    branches = (
        statistics_branch(zeros if x is None else x, weight, bias, stats),
        statistics_branch(zeros if residual is None else residual, weight_r, bias_r, stats_r),
    )
    from_batch = source == Statistics.BATCH, source_r == Statistics.BATCH
    found = backward(dy, y, mask, *branches, gate, from_batch, CATALOGUE[act], needs)
    return dense(found, dy, y, mask, x, residual)


def bn_act_pool_forward(
    x, weight, bias, mean, var, source, momentum, eps, kernel_size, stride, padding, act, keep_choice
):
    stats = batch_statistics(x, mean, var, source, momentum, eps)
    a = CATALOGUE[act].formula(statistics_branch(x, weight, bias, stats).affine()).to(x.dtype)
    largest, pixel = torch.nn.functional.max_pool2d(a, kernel_size, stride, padding, return_indices=True)
    order = torch.channels_last if kernels.is_channels_last(kernels.empty_output(x)) else torch.contiguous_format
    y = largest.contiguous(memory_format=order)
    if not keep_choice:
        return y, stats, y.new_empty(0, dtype=torch.uint8)
    row, column = (torch.arange(n) * s - p for n, s, p in zip(y.shape[2:], stride, padding, strict=True))
    position = (pixel // x.shape[3] - row[:, None]) * kernel_size[1] + pixel % x.shape[3] - column
    flat = ~CATALOGUE[act].derivative(largest).bool()
    choice = position.masked_fill(flat, PASSES_NOTHING).to(torch.uint8)
    return y, stats, choice.contiguous(memory_format=order)


def bn_act_pool_backward(dy, choice, x, weight, stats, source, kernel_size, stride, padding, needs):
    passes = choice != PASSES_NOTHING
    pixel = chosen_pixel(choice, Window(kernel_size, stride, padding), x.shape[3])
    g = torch.zeros(x.shape, dtype=torch.float64).flatten(2)
    g.scatter_add_(2, pixel.where(passes, 0).flatten(2), dy.double().where(passes, 0.0).flatten(2))
    operand = statistics_branch(x, weight, None, stats)
    dx, dweight, dbias = branch_backward(g.view(x.shape), operand, source == Statistics.BATCH)
    need_x, need_weight, need_bias = needs
    return (
        kernels.empty_output(x).copy_(dx) if need_x else kernels.nothing(x),
        dweight.to(stats.dtype) if need_weight else kernels.nothing(stats),
        dbias.to(stats.dtype) if need_bias else kernels.nothing(stats),
    )


def _objection(request: Request) -> str | None:
    return None


BACKEND = Backend(
    "python",
    _objection,
    kernels={
        "affine_act_forward": affine_act_forward,
        "affine_act_backward": affine_act_backward,
        "bn_act_forward": bn_act_forward,
        "bn_act_backward": bn_act_backward,
        "bn_act_pool_forward": bn_act_pool_forward,
        "bn_act_pool_backward": bn_act_pool_backward,
    },
    keys=("CPU", "CUDA"),
)


@contextmanager
def registered(backend: Backend = BACKEND) -> Iterator[Backend]:
    """With `backend` first in the dispatcher's order."""
    ops.register_backend(backend)
    try:
        yield backend
    finally:
        ops.unregister_backend(backend)

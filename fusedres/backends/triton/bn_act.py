"""bn_act on NVIDIA GPUs: batch statistics, then the elementwise pass; the gradients in two passes."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.backends import Statistics
from fusedres.backends.triton.backward import Saved, backward
from fusedres.backends.triton.configurations import STATISTICS
from fusedres.backends.triton.forward import forward
from fusedres.backends.triton.launch import Operand, Plan, finish
from fusedres.backends.triton.statistics import statistics_finish, statistics_parts
from fusedres.backends.triton.view import View, accumulation_dtype


def bn_act_forward(
    x, weight, bias, mean, var, residual, weight_r, bias_r, mean_r, var_r, gate,
    source, source_r, momentum, momentum_r, eps, eps_r, act, keep_mask,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y, the statistics of both norms and the mask; the running statistics move.

    From batch statistics reads x and a normalised residual twice, a plain one once, and writes y.
    """
    with torch.cuda.device_of(x):
        stats_r = statistics(x if residual is None else residual, mean_r, var_r, source_r, momentum_r, eps_r)
        stats = statistics(x, mean, var, source, momentum, eps)
        branch = Operand.of_norm(x, weight, bias, stats)
        y, mask = forward(branch, Operand.of_norm(residual, weight_r, bias_r, stats_r), gate, act, keep_mask)
        return y, stats, stats_r, mask


def statistics(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, source: int, momentum: float, eps: float
) -> Tensor:
    """(3, C): the mean's high part, its remainder, 1 / sqrt(var + eps); (0,) for an absent norm."""
    if source == Statistics.ABSENT:
        return x.new_empty(0, dtype=accumulation_dtype(x))
    from_batch = source == Statistics.BATCH
    view = View.of(x).merged()
    plan = Plan.of(STATISTICS, view, x)
    stats = x.new_empty((3, view.channels), dtype=accumulation_dtype(x))
    parts, partial = plan.parts(plan.tiles, 1), None
    if from_batch:
        partial = stats.new_empty((3, parts, view.channels))
        plan.run(statistics_parts, parts, x, partial, view.pixels, view.channels, plan.tiles, parts)
    finish(
        statistics_finish,
        1,
        view.channels,
        x,
        partial,
        running_mean,
        running_var,
        stats,
        view.pixels,
        view.channels,
        parts,
        momentum,
        eps,
        FROM_BATCH=from_batch,
        CHANNELS_LAST=view.channels_last,
        ACC=plan.constants["ACC"],
    )
    return stats


def bn_act_backward(
    dy, y, mask, x, weight, bias, stats, residual, weight_r, bias_r, stats_r, gate, source, source_r, act, needs
) -> tuple[Tensor, ...]:
    """The seven gradients, those that are not needed empty."""
    with torch.cuda.device_of(dy):
        branch = Operand.of_norm(x, weight, bias, stats)
        shortcut = Operand.of_norm(residual, weight_r, bias_r, stats_r)
        from_batch = source == Statistics.BATCH, source_r == Statistics.BATCH
        return backward(Saved(dy, y, mask, branch, shortcut, gate, act, from_batch), needs)

"""bn_act on NVIDIA GPUs: batch statistics, then the elementwise pass; the gradients in two passes."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.backends import Statistics
from fusedres.backends.triton.arguments import Gate, Operand, Slope
from fusedres.backends.triton.backward import Saved, backward
from fusedres.backends.triton.configurations import STATISTICS
from fusedres.backends.triton.forward import Results, forward
from fusedres.backends.triton.launch import Plan, finish
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
        results = Results.empty(x, keep_mask)
        shortcut = norm_operand(residual, weight_r, bias_r, mean_r, var_r, source_r, momentum_r, eps_r)
        branch = norm_operand(x, weight, bias, mean, var, source, momentum, eps)
        forward(branch, shortcut, Gate.of(gate), act, results, (eps, eps_r))
        stats, stats_r = (_nothing(x) if t.stats is None else t.stats for t in (branch, shortcut))
        return results.y, stats, stats_r, results.mask


def norm_operand(
    x: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    source: int,
    momentum: float,
    eps: float,
) -> Operand:
    """x and its norm: batch statistics are found here, running ones by the pass that uses them, which keeps them."""
    if x is None or source == Statistics.ABSENT:
        return Operand(x)
    stats = x.new_empty((3, x.shape[1]), dtype=accumulation_dtype(x.dtype))
    if source == Statistics.RUNNING:
        return Operand(x, running_mean, running_var, stats, weight, bias)
    find_statistics(x, running_mean, running_var, momentum, eps, stats)
    return Operand.of_norm(x, weight, bias, stats)


def find_statistics(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float, eps: float, stats: Tensor
) -> None:
    """stats (3, C): the mean's high part, its remainder, 1 / sqrt(var + eps)."""
    view = View.of(x).merged()
    plan = Plan.of(STATISTICS, view, x)
    parts = plan.parts(plan.tiles, 1)
    partial = stats.new_empty((3, parts, view.channels))
    plan.run(statistics_parts, parts, x, partial, view.pixels, view.channels, plan.tiles, parts)
    running, sizes = (running_mean, running_var), (view.pixels, view.channels, parts)
    finish(statistics_finish, 1, view.channels, x, partial, *running, stats, *sizes, momentum, eps, CUT=plan.cut)


def _nothing(x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=accumulation_dtype(x.dtype))


def bn_act_backward(
    dy, y, mask, x, weight, bias, stats, residual, weight_r, bias_r, stats_r, gate, source, source_r, act, needs
) -> tuple[Tensor, ...]:
    """The seven gradients, those that are not needed empty."""
    with torch.cuda.device_of(dy):
        branch = Operand.of_norm(x, weight, bias, stats)
        shortcut = Operand.of_norm(residual, weight_r, bias_r, stats_r)
        from_batch = source == Statistics.BATCH, source_r == Statistics.BATCH
        return backward(Saved(Slope(dy, y, mask), None, branch, shortcut, Gate.of(gate), act, from_batch), needs)

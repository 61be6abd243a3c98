"""bn_act_pool on NVIDIA GPUs: batch statistics, then one pass that normalises, activates and pools."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedres.backends import Statistics, Window
from fusedres.backends.triton.arguments import Gate, Operand, Slope
from fusedres.backends.triton.backward import Saved, backward
from fusedres.backends.triton.bn_act import norm_operand
from fusedres.backends.triton.configurations import POOL_APPLY
from fusedres.backends.triton.launch import Plan
from fusedres.backends.triton.pool import Pool, pool_apply
from fusedres.backends.triton.view import View
from fusedres.epilogue import find


def bn_act_pool_forward(
    x, weight, bias, mean, var, source, momentum, eps, kernel_size, stride, padding, act, keep_choice
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the statistics and what every window chose; the running statistics move.

    From batch statistics reads x twice and writes y and a byte a window.
    """
    with torch.cuda.device_of(x):
        pool, view = pool_of(x, kernel_size, stride, padding), View.of_planes(x)
        sizes, order = (pool.out_rows, pool.out_columns), view.memory_format(x)
        y = torch.empty((*x.shape[:2], *sizes), dtype=x.dtype, device=x.device, memory_format=order)
        choice = torch.empty_like(y, dtype=torch.uint8) if keep_choice else y.new_empty(0, dtype=torch.uint8)
        operand = norm_operand(x, weight, bias, mean, var, source, momentum, eps)
        assert operand.stats is not None
        pool = pool._replace(choice=choice if keep_choice else None)
        view = view._replace(pixels=sizes[0] * sizes[1])
        plan = Plan.of(POOL_APPLY, view, x)
        plan.run_elementwise(pool_apply, operand, pool, y, eps, view.pixels, view.channels, plan.tiles, ACT=act)
        return y, operand.stats, choice


def pool_of(x: Tensor, *window: Sequence[int]) -> Pool:
    kernel_size, stride, padding = ((rows, columns) for rows, columns in window)
    return Pool.of(Window(kernel_size, stride, padding), (x.shape[2], x.shape[3]))


def bn_act_pool_backward(
    dy, choice, x, weight, stats, source, kernel_size, stride, padding, needs
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias, those that are not needed empty.

    Reads x, dy and the choices twice and writes dx; a pixel gathers what the windows that chose it got.
    """
    with torch.cuda.device_of(dy):
        pool = pool_of(x, kernel_size, stride, padding)._replace(choice=choice)
        operand = Operand.of_norm(x, weight, None, stats)
        identity, from_batch = find("identity").code, (source == Statistics.BATCH, False)
        saved = Saved(Slope(dy), pool, operand, Operand(), Gate.of(None), identity, from_batch)
        dx, dweight, dbias, *_ = backward(saved, [*needs, False, False, False, False])
        return dx, dweight, dbias

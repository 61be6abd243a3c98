"""The elementwise pass of every op's forward."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.backends.triton.apply import apply
from fusedres.backends.triton.arguments import Gate, Operand
from fusedres.backends.triton.configurations import APPLY
from fusedres.backends.triton.launch import Plan
from fusedres.backends.triton.view import View


def forward(
    x: Operand, r: Operand, gate: Gate, act: int, keep_mask: bool, eps: tuple[float, float] = (0.0, 0.0)
) -> tuple[Tensor, Tensor]:
    """y = act(k * X + R), and its mask; eps is of norms by running statistics."""
    assert x.data is not None
    view = View.of(x.data)
    y = view.empty_output(x.data)
    mask = view.empty_mask(y) if keep_mask else y.new_empty(0, dtype=torch.uint8)
    if not gate.per_image():
        view = view.merged()
    plan = Plan.of(APPLY, view, y)
    sizes = view.pixels, view.channels, plan.tiles
    plan.run_elementwise(apply, x, r, gate, y, mask if keep_mask else None, *eps, *sizes, ACT=act)
    return y, mask

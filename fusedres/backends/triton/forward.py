"""The elementwise pass of every op's forward."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusedres.backends.triton.apply import apply
from fusedres.backends.triton.arguments import Gate, Operand
from fusedres.backends.triton.configurations import APPLY
from fusedres.backends.triton.launch import Plan
from fusedres.backends.triton.view import View


class Results(NamedTuple):
    """What a forward fills."""

    view: View
    y: Tensor
    mask: Tensor  # empty where it is not wanted

    @staticmethod
    def empty(x: Tensor, keep_mask: bool) -> Results:
        """Made before running statistics move, so that a step for which memory is short leaves them."""
        view = View.of(x)
        y = view.empty_output(x)
        return Results(view, y, view.empty_mask(y) if keep_mask else y.new_empty(0, dtype=torch.uint8))


def forward(
    x: Operand, r: Operand, gate: Gate, act: int, results: Results, eps: tuple[float, float] = (0.0, 0.0)
) -> None:
    """y = act(k * X + R), and its mask; eps is of norms by running statistics."""
    view, y, mask = results
    if not gate.per_image():
        view = view.merged()
    plan = Plan.of(APPLY, view, y)
    sizes = view.pixels, view.channels, plan.tiles
    plan.run_elementwise(apply, x, r, gate, y, mask if mask.numel() else None, *eps, *sizes, ACT=act)

"""The elementwise pass of every op's forward."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.backends.triton.apply import apply
from fusedres.backends.triton.configurations import APPLY
from fusedres.backends.triton.launch import Operand, Plan, gate_strides, per_image
from fusedres.backends.triton.view import View


def forward(x: Operand, r: Operand, gate: Tensor | None, act: int, keep_mask: bool) -> tuple[Tensor, Tensor]:
    """y = act(k * X + R), and its mask."""
    assert x.data is not None
    view = View.of(x.data)
    y = view.empty_output(x.data)
    mask = view.empty_mask(y) if keep_mask else y.new_empty(0, dtype=torch.uint8)
    if not per_image(gate):
        view = view.merged()
    plan = Plan.of(APPLY, view, y)
    plan.run_elementwise(
        apply,
        *x[:-1],
        *r[:-1],
        gate,
        gate_strides(gate),
        y,
        mask if keep_mask else None,
        view.pixels,
        view.channels,
        plan.tiles,
        NORM_X=x.norm,
        NORM_R=r.norm,
        ACT=act,
    )
    return y, mask

"""affine_act on NVIDIA GPUs: the elementwise pass alone, and the gradients that all ops share."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.backends.triton.arguments import Gate, Operand, Slope
from fusedres.backends.triton.backward import Saved, backward
from fusedres.backends.triton.forward import Results, forward


def affine_act_forward(
    x, scale, bias, mean, residual, scale_r, bias_r, mean_r, gate, act, keep_mask
) -> tuple[Tensor, Tensor]:
    """y and its mask: reads x and the residual, writes y."""
    with torch.cuda.device_of(x):
        branch = Operand(x, mean, weight=scale, bias=bias)
        shortcut = Operand(residual, mean_r, weight=scale_r, bias=bias_r)
        results = Results.empty(x, keep_mask)
        forward(branch, shortcut, Gate.of(gate), act, results)
        return results.y, results.mask


def affine_act_backward(
    dy, y, mask, x, scale, bias, mean, residual, scale_r, bias_r, mean_r, gate, act, needs
) -> tuple[Tensor, ...]:
    """The seven gradients, those that are not needed empty."""
    with torch.cuda.device_of(dy):
        branch = Operand(x, mean, weight=scale, bias=bias)
        shortcut = Operand(residual, mean_r, weight=scale_r, bias=bias_r)
        return backward(Saved(Slope(dy, y, mask), None, branch, shortcut, Gate.of(gate), act, (False, False)), needs)

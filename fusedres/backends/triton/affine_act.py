"""affine_act on NVIDIA GPUs: the elementwise pass alone, and the gradients that all ops share."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.backends.triton.backward import Saved, backward
from fusedres.backends.triton.forward import forward
from fusedres.backends.triton.launch import Operand


def affine_act_forward(
    x, scale, bias, mean, residual, scale_r, bias_r, mean_r, gate, act, keep_mask
) -> tuple[Tensor, Tensor]:
    """y and its mask: reads x and the residual, writes y."""
    with torch.cuda.device_of(x):
        branch = Operand(x, mean, scale, bias, False)
        return forward(branch, Operand(residual, mean_r, scale_r, bias_r, False), gate, act, keep_mask)


def affine_act_backward(
    dy, y, mask, x, scale, bias, mean, residual, scale_r, bias_r, mean_r, gate, act, needs
) -> tuple[Tensor, ...]:
    """The seven gradients, those that are not needed empty."""
    with torch.cuda.device_of(dy):
        branch = Operand(x, mean, scale, bias, False)
        shortcut = Operand(residual, mean_r, scale_r, bias_r, False)
        return backward(Saved(dy, y, mask, branch, shortcut, gate, act, (False, False)), needs)

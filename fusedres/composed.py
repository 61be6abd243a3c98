"""A block by PyTorch's own operators, one after the other: what eager computes, without the calls of its modules.

On a small input the time goes into calls from Python, and here are fewer of them than in eager and in a kernel's way
there: children are called as the functions they are, wherever that is all that calling them would do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fusedres.epilogue import RELU, Activation
from fusedres.executor import Parts
from fusedres.modules import count_batch, member, norm_of
from fusedres.segment import is_bare


def is_possible(parts: Parts) -> bool:
    """Whether the block says in full how its children's results are put together; a gate has no one operator."""
    return parts.gate is None


def execute(parts: Parts, x: Tensor) -> Tensor:
    """The block's output, by eager's operators in eager's order, so that every bit is eager's."""
    z = x
    *inner, last = parts.spans
    for span in inner:
        z = _normalise(span.norm, _convolve(span.conv, z))
        for child in span.before_act:
            z = child(z)
        z = _activate(z, span.act, is_own=not span.before_act)
        for child in span.after_act:
            z = child(z)
    z = _normalise(last.norm, _convolve(last.conv, z))
    for child in parts.between:
        z = child(z)
    shortcut = x
    for child in parts.before_shortcut_norm:
        shortcut = _convolve(child, shortcut)
    if parts.shortcut_norm is not None:
        shortcut = _normalise(parts.shortcut_norm, shortcut)
    return join(parts, z, shortcut)


def join(parts: Parts, z: Tensor, shortcut: Tensor) -> Tensor:
    """The addition at a block's end and what follows it; `z` is nobody else's."""
    if parts.adds_in_place:
        z += shortcut
    else:
        z = z + shortcut
    return _activate(z, parts.act, is_own=True)


def _convolve(module: Any, x: Tensor) -> Tensor:
    """A child's output, which mostly is a convolution."""
    if not is_bare(module) or module.padding_mode != "zeros":
        return module(x)
    weight, bias = member(module, "weight"), member(module, "bias")
    return torch.conv2d(x, weight, bias, module.stride, module.padding, module.dilation, module.groups)


def _normalise(module: nn.Module, x: Tensor) -> Tensor:
    # One value to a channel is an error of the module's own.
    if type(module) is not nn.BatchNorm2d or x.numel() == x.shape[1]:
        return module(x)
    count_batch(module)
    weight, bias, mean, var, training, momentum, eps = norm_of(module)
    return torch.batch_norm(x, weight, bias, mean, var, training, momentum, eps, False)


def _activate(z: Tensor, act: nn.Module | Activation, *, is_own: bool) -> Tensor:
    """In place where nobody else has seen `z`, and ReLU needs no more than its own output."""
    if act is RELU and is_own:
        return torch.relu_(z)
    return act.formula(z) if isinstance(act, Activation) else act(z)

"""Batch norms folded into the convolutions before them, in fp64 and rounded once.

gate * ((conv(x) + conv.bias - mean) * scale + bias)  =  conv'(x) + bias'
weight' = weight * gate * scale,  bias' = gate * ((conv.bias - mean) * scale + bias),  scale = gamma / sqrt(var + eps)

A weight that is stored in 16 bits would be rounded a second time. Where the backend can multiply the sums by them, and
where a pass follows the convolution anyway, the factors stay apart: conv'(x) = conv(x) * gate * scale.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn

from fusedres.backends import Filter, Geometry
from fusedres.inference.steps import Convolve, Mode
from fusedres.modules import dtypes_fit, is_batch_norm, is_hooked, norm_of

CASTS = (torch.float32, torch.bfloat16, torch.float16)  # what autocast casts


def objection(conv: nn.Conv2d) -> str | None:
    """Why a convolution is left to its module."""
    if type(conv) is not nn.Conv2d:
        return f"it is a {type(conv).__name__}"
    if is_hooked(conv):
        return "it has hooks or a patched forward"
    if conv.padding_mode != "zeros":
        return f"it pads in mode {conv.padding_mode!r}"
    if any(type(t) is not nn.Parameter for t in (conv.weight, conv.bias) if t is not None):
        return "its weight is no plain parameter"
    return None if _padding(conv) is not None else "it pads one side more than the other"


def geometry_of(conv: nn.Module, mode: Mode) -> Geometry | None:
    """How the convolution lies, where it can be computed by another's hand."""
    if not isinstance(conv, nn.Conv2d) or objection(conv) is not None:
        return None
    if conv.weight.dtype not in (CASTS if mode.autocast else (mode.dtype,)):
        return None
    padding = _padding(conv)
    return None if padding is None else Geometry(_pair(conv.stride), padding, _pair(conv.dilation), conv.groups)


def _padding(conv: nn.Conv2d) -> tuple[int, int] | None:
    if not isinstance(conv.padding, str):
        return _pair(conv.padding)
    if conv.padding == "valid":
        return 0, 0
    totals = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    return None if any(total % 2 for total in totals) else (totals[0] // 2, totals[1] // 2)


def _pair(values: tuple[int, ...]) -> tuple[int, int]:
    rows, columns = values
    return rows, columns


def folds(norm: object, dtype: torch.dtype) -> bool:
    """Whether the module is a norm that multiplies and adds constants, and keeps `dtype`."""
    if not isinstance(norm, nn.Module) or not is_batch_norm(norm) or is_hooked(norm) or not dtypes_fit(dtype, norm):
        return False
    found = norm_of(norm)
    return not found.training and found.running_mean is not None and found.running_var is not None


def multiplies(gate: Tensor | float | None, conv: nn.Conv2d, dtype: torch.dtype) -> bool:
    """Whether a gate is one constant, or one for each channel of the convolution, and keeps `dtype`."""
    if not isinstance(gate, Tensor):
        return gate is None or isinstance(gate, int | float)
    if gate.dim() == 0 or gate.dtype != dtype:
        return gate.dim() == 0
    shape = gate.shape[1:] if gate.dim() == 4 else gate.shape
    return gate.numel() == 1 or (shape[0] == gate.numel() == conv.out_channels)


def is_connecting(module: object, mode: Mode) -> TypeGuard[nn.Linear]:
    """Whether it is a fully connected layer that is worth packing: in bf16 aten's takes twice as long, and under
    autocast casts its weight in every call."""
    if type(module) is not nn.Linear or is_hooked(module) or mode.dtype is not torch.bfloat16:
        return False
    parameters = [t for t in (module.weight, module.bias) if t is not None]
    dtypes = CASTS if mode.autocast else (mode.dtype,)
    return mode.device.type == "cpu" and all(type(t) is nn.Parameter and t.dtype in dtypes for t in parameters)


def filter_of(linear: nn.Linear, dtype: torch.dtype) -> Filter:
    """Of the convolution of one pixel that it is."""
    weight, bias = linear.weight.detach().to(dtype), None if linear.bias is None else linear.bias.detach()
    return Filter(weight.view(*weight.shape, 1, 1), None if bias is None else bias.to(dtype).float())


def fold(step: Convolve, dtype: torch.dtype, *, apart: bool) -> Filter:
    """The weight in `dtype`; the bias in at least fp32, for the backend to round.

    Args:
        apart: whether factors stay apart where a product with them would be rounded to 16 bits again.
    """
    conv = step.conv
    factor = torch.ones((), dtype=torch.float64, device=conv.weight.device)
    bias = None if conv.bias is None else conv.bias.detach().double()
    if step.norm is not None:
        norm = norm_of(step.norm)
        gamma, beta, mean, var = (None if t is None else t.detach().double() for t in norm[:4])
        assert mean is not None and var is not None  # `folds`
        scale = (var + norm.eps).rsqrt() * (1.0 if gamma is None else gamma)
        bias = (-mean if bias is None else bias - mean) * scale
        bias = bias if beta is None else bias + beta
        factor = factor * scale
    if step.gate is not None:
        gate = step.gate.detach().double().flatten() if isinstance(step.gate, Tensor) else step.gate
        factor = factor * gate
        bias = None if bias is None else bias * gate
    wide = torch.promote_types(dtype, torch.float32)
    bias = None if bias is None else bias.to(wide)
    weight, order = conv.weight.detach(), torch.channels_last
    if apart and weight.dtype is dtype is not wide and (step.norm is not None or step.gate is not None):
        scale = factor.to(wide).expand(conv.out_channels).contiguous()
        return Filter(weight.contiguous(memory_format=order), bias, scale)
    weight = weight.double() * factor.view(-1, 1, 1, 1)
    return Filter(weight.to(dtype).contiguous(memory_format=order), bias)

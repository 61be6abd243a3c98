"""What the Triton backend says of conv_act before it is called: what it objects to, and what it would run.

Its kernel is a matrix product, so windows of one pixel are all that it has.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch
from torch import Tensor

from fusedres.backends import Convolution, Filter, Geometry, Pack, Request
from fusedres.epilogue import Activation

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def pack(taps: Filter, geometry: Geometry, sizes: Sequence[int], joins: bool) -> Filter:
    """The weight row by row; bias and scale as they are."""
    return taps._replace(weight=taps.weight.contiguous())


def run(
    x: Tensor, taps: Filter, residual: Tensor | None, geometry: Geometry, act: Activation, in_place: bool
) -> Tensor:
    """The kernel's own, whose module, and Triton with it, is imported at the first call."""
    conv_act = importlib.import_module("fusedres.backends.triton.conv_act")
    return conv_act.run(x, taps, residual, geometry, act, in_place)


def forms(weight: Sequence[int], geometry: Geometry, sizes: Sequence[int], dtype: torch.dtype) -> dict[str, Pack]:
    """The way that it is cut, so that times are of one way."""
    conv_act = importlib.import_module("fusedres.backends.triton.conv_act")
    return {conv_act.form(weight, geometry, sizes, dtype): pack}


def objection(request: Request) -> str | None:
    """Why the kernel can't serve the operands, as one sentence, on whatever device."""
    if request.compiling:
        return "torch.compile fuses the reference's operations itself"
    geometry = request.geometry
    if geometry is None or request.window_positions != 1:
        return "its convolutions are 1x1"
    if geometry != Geometry(geometry.stride, dilation=geometry.dilation):
        return "its convolutions are without padding and of one group"
    if request.wants_gradient:
        return "its convolutions have no backward; call it under torch.no_grad() or torch.inference_mode()"
    if request.subclass or request.empty:
        return "x is a tensor subclass, or empty"
    if request.dtype not in _DTYPES:
        return f"x is {request.dtype}, and its convolutions are in {', '.join(map(str, _DTYPES))}; convert it"
    reason = request.disagreement()
    if reason is not None:
        return reason
    if request.tf32:
        return (
            "cuDNN may multiply float32 as TF32 here, which the kernel does not; convert x, or ask for float32 with "
            "torch.backends.cudnn.conv.fp32_precision = 'ieee'"
        )
    return None


CONVOLUTION = Convolution(
    pack, run, forms, scales=True, reserve="it was not measured to be faster here; optimize(model, example) measures it"
)

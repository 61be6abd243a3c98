"""The compiled CPU kernels: the ops at memory speed."""

from __future__ import annotations

import torch

from fusedres import build
from fusedres.backends import Backend, Request, native_convolution, native_training
from fusedres.build import Unavailable
from fusedres.native_sources import NATIVE

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def objection(request: Request) -> str | None:
    """Why the kernels can't serve a request, as one sentence."""
    return _OBJECTIONS.get(request.op, operand_objection)(request) or _library_objection(request)


def operand_objection(request: Request) -> str | None:
    """Why compiled kernels can't take such operands; they are the same for every device."""
    if request.dtype not in _DTYPES:
        return f"its kernels have no {request.dtype}; convert x to one of {', '.join(map(str, _DTYPES))}"
    if request.layout == "strided":
        return "x is neither contiguous nor channels_last; call x.contiguous() first"
    accumulation = torch.promote_types(request.dtype, torch.float32)
    if request.parameter_dtype not in (None, accumulation, request.dtype):
        return (
            f"for {request.dtype} its kernels take {accumulation} parameters and running statistics, "
            f"not {request.parameter_dtype}; keep the norm in {accumulation}"
        )
    if request.gate_dtype not in (None, request.dtype, torch.float32):
        return (
            f"its kernels take a gate of {request.dtype} or torch.float32, not {request.gate_dtype}; convert the gate"
        )
    return _residual_objection(request)


def _residual_objection(request: Request) -> str | None:
    if request.residual_dtype is None:
        return None
    if request.residual_dtype != request.dtype:
        return f"the residual is {request.residual_dtype} and x {request.dtype}; convert one of them"
    if "both" not in (request.residual_layout, request.layout) and request.residual_layout != request.layout:
        return f"the residual is {request.residual_layout} in memory and x {request.layout}; bring both into one layout"
    if request.residual_layout == "strided":
        return "the residual is neither contiguous nor channels_last; call residual.contiguous() first"
    return None


def _library_objection(request: Request) -> str | None:
    found = build.resolved(NATIVE) if request.compiling else build.library(NATIVE)
    if found is None:
        return "the compiled library is not loaded, and tracing must not build it; call the model once before"
    return found.reason if isinstance(found, Unavailable) else None


_OBJECTIONS = {"conv": native_training.objection, "conv_act": native_convolution.objection}
BACKEND = Backend(
    "native",
    objection,
    keys=("CPU",),
    convolution=native_convolution.CONVOLUTION,
    training_convolution=native_training.TRAINING_CONVOLUTION,
)

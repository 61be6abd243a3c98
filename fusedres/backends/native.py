"""The compiled CPU kernels: bn_act and affine_act at memory speed."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import torch

from fusedres.backends import Backend, Request

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def load(path: Path) -> None:
    """Load a compiled library; its operators come to life with the backend's schemas."""
    torch.ops.load_library(str(path))


@cache
def library() -> str | None:
    """Make sure that the compiled library is loaded: None, or the reason why it is not to be had."""
    path = os.environ.get("FUSEDRES_NATIVE_LIBRARY")
    if path is None:
        return "the native library has not been built; set FUSEDRES_NATIVE_LIBRARY to one"
    load(Path(path))
    return None


def objection(request: Request) -> str | None:
    """Why the kernels can't serve a request, as one sentence."""
    if request.dtype not in _DTYPES:
        return f"its kernels have no {request.dtype}; convert x to one of {', '.join(map(str, _DTYPES))}"
    if request.layout == "strided":
        return "x is neither contiguous nor channels_last; call x.contiguous() first"
    accumulation = torch.promote_types(request.dtype, torch.float32)
    if request.parameter_dtype not in (None, accumulation):
        return (
            f"for {request.dtype} its kernels take {accumulation} parameters and running statistics, "
            f"not {request.parameter_dtype}; keep the norm in {accumulation}"
        )
    if request.gate_dtype not in (None, request.dtype, torch.float32):
        return f"its kernels take a gate of {request.dtype} or torch.float32, not {request.gate_dtype}; convert the gate"
    return _residual_objection(request) or library()


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


BACKEND = Backend("native", objection, keys=("CPU",))

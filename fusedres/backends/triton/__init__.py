"""Triton kernels for NVIDIA GPUs from sm_80 on: every op with no toolchain beyond Triton's own.

Importing this imports no Triton and opens no CUDA context; the first objection and the first kernel do.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch

from fusedres.backends import CONVOLUTIONS, Backend, Request
from fusedres.backends.triton import convolution

OPS = ("affine_act", "bn_act", "bn_act_pool")
OLDEST = 80
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def objection(request: Request) -> str | None:
    """Why the kernels can't serve a request, as one sentence with the remedy."""
    if request.op in CONVOLUTIONS and request.device != "cuda":
        return f"it has no convolutions for {request.device} tensors"
    return operand_objection(request) or machine_objection()


def operand_objection(request: Request) -> str | None:
    """What speaks against the operands, on whatever machine."""
    if request.op in CONVOLUTIONS:
        return convolution.objection(request)
    if request.dtype not in _DTYPES:
        return f"its kernels have no {request.dtype}; convert x to one of {', '.join(map(str, _DTYPES))}"
    if request.layout == "strided":
        return "x is neither contiguous nor channels_last; call x.contiguous() first"
    accumulation = torch.promote_types(request.dtype, torch.float32)
    if request.parameter_dtype not in (None, request.dtype, accumulation):
        return (
            f"for {request.dtype} its kernels take parameters and running statistics of {request.dtype} or of "
            f"{accumulation}, not {request.parameter_dtype}; convert the norm"
        )
    if request.gate_dtype not in (None, request.dtype, accumulation):
        return (
            f"its kernels take a gate of {request.dtype} or {accumulation}, not {request.gate_dtype}; convert the gate"
        )
    return _residual_objection(request)


def _residual_objection(request: Request) -> str | None:
    if request.residual_dtype is None:
        return None
    if request.residual_dtype != request.dtype:
        return f"the residual is {request.residual_dtype} and x {request.dtype}; convert one of them"
    if request.residual_layout == "strided":
        return "the residual is neither contiguous nor channels_last; call residual.contiguous() first"
    if "both" not in (request.residual_layout, request.layout) and request.residual_layout != request.layout:
        return f"the residual is {request.residual_layout} in memory and x {request.layout}; bring both into one layout"
    return None


_machine: list[str | None] = []


def machine_objection() -> str | None:
    """What this machine lacks, found out once: torch.compile traces a look into a list, not the search."""
    if not _machine:
        _machine.append(_find_machine_objection())
    return _machine[0]


def _find_machine_objection() -> str | None:
    if torch.version.cuda is None:
        return "its kernels have not been run on GPUs that are not NVIDIA's; use the reference backend"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; run `pip install triton`"
    if not any(shutil.which(name) for name in (os.environ.get("CC", ""), "gcc", "clang") if name):
        return "Triton finds no C compiler to build its launcher with; install gcc, or set CC"
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        if 10 * major + minor < OLDEST:
            return (
                f"CUDA device {index} is sm_{major}{minor} and its kernels need sm_{OLDEST}; "
                "hide the device with CUDA_VISIBLE_DEVICES"
            )
    return None


def _kernel(op: str, direction: str) -> Callable[..., Any]:
    """A kernel's function, whose module, and Triton with it, is imported at the first call."""

    def kernel(*arguments: Any) -> Any:
        module = importlib.import_module(f"{__name__}.{op}")
        return getattr(module, f"{op}_{direction}")(*arguments)

    return kernel


KERNELS = {f"{op}_{direction}": _kernel(op, direction) for op in OPS for direction in ("forward", "backward")}
BACKEND = Backend("triton", objection, kernels=KERNELS, keys=("CUDA",), convolution=convolution.CONVOLUTION)

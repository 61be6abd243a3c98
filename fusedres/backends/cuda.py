"""The compiled CUDA kernels: what stays on chip between a batch norm's two passes is read once."""

from __future__ import annotations

import re

import torch

from fusedres import build, nvcc
from fusedres.backends import Backend, Request, native
from fusedres.build import BuildError, Library, Unavailable
from fusedres.native_sources import CUDA

OPS = ("affine_act", "bn_act")
_OLDEST = (8, 0)


def objection(request: Request) -> str | None:
    """Why the kernels can't serve a request, as one sentence."""
    return operand_objection(request) or _device_objection() or _library_objection(request)


def operand_objection(request: Request) -> str | None:
    """What speaks against the operands, on whatever machine."""
    return native.operand_objection(request)


def _device_objection() -> str | None:
    if torch.version.cuda is None:
        return "this torch is built without CUDA; install one with it"
    # A choice is cached by metadata, which has no device number: the oldest GPU decides for all.
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if capability < _OLDEST:
            name = f"{torch.cuda.get_device_name(index)} (sm_{capability[0]}{capability[1]})"
            return f"its kernels need a GPU of compute capability 8.0 or later, and this machine has a {name}"
    return None


def _library_objection(request: Request) -> str | None:
    found = build.resolved(CUDA)
    if found is None and request.compiling:
        return "the CUDA library is not loaded, and tracing must not build it; call the model once before"
    if found is None:
        reason = None if build.is_built_ahead(CUDA) else toolkit_objection(str(torch.version.cuda))
        if reason is not None:
            return reason
        found = build.library(CUDA)
    if isinstance(found, Unavailable):
        return found.reason
    return mismatch(str(torch.version.cuda), built_with(found))


def toolkit_objection(torch_cuda: str) -> str | None:
    """Why the nvcc that would build the library does not fit torch."""
    try:
        return mismatch(torch_cuda, ".".join(map(str, nvcc.release())))
    except BuildError:  # the builder looks for a library that is there already, and else says this itself
        return None


def mismatch(torch_cuda: str, toolkit: str) -> str | None:
    """Why a library of one CUDA release can't serve a torch of another; both as "major.minor"."""
    major = torch_cuda.partition(".")[0]
    if major == toolkit.partition(".")[0]:
        return None
    return (
        f"torch is built for CUDA {torch_cuda} and the CUDA toolkit is {toolkit}; "
        f"set CUDA_HOME to a toolkit of CUDA {major}, or install a torch for CUDA {toolkit}"
    )


def built_with(library: Library) -> str:
    """The release of the toolkit that made a library."""
    found = re.search(r"\(release ([\d.]+)", build.recorded_compiler(library))
    return found[1] if found else "unknown"


BACKEND = Backend("cuda", objection, keys=("CUDA",), ops=OPS)

"""What the compiled libraries hold and what of it runs on this machine, through an optional module of pybind11's.

Nothing else needs it: without pybind11 the facts are None.
"""

from __future__ import annotations

import platform
import sysconfig
from functools import cache
from importlib.machinery import ExtensionFileLoader
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec, module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fusedres import build, compiler
from fusedres.build import Library
from fusedres.compiler import BuildError, Compiler
from fusedres.native_sources import COMMON_FLAGS, CSRC, CUDA, NATIVE
from fusedres.target import Source, Target


def _find() -> Compiler:
    """The compiler, with the headers of this Python and its pybind11."""
    spec = find_spec("pybind11")
    if spec is None or spec.origin is None:
        raise BuildError("pybind11 is not installed; the facts of the libraries need it")
    found = compiler.find()
    headers = (str(Path(spec.origin).parent / "include"), sysconfig.get_path("include"))
    try:
        pybind11 = version("pybind11")
    except PackageNotFoundError:
        pybind11 = "of unknown version"
    argv = (*found.argv, *(word for folder in headers for word in ("-isystem", folder)))
    return Compiler(argv, f"{found.version}, pybind11 {pybind11}")


HOST = Target("fusedres_host", CSRC, (Source("bindings/host.cpp"),), COMMON_FLAGS, links_torch=False, find=_find)


@cache
def cpu_name() -> str:
    """The processor's own name for itself, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def facts() -> dict[str, Any]:
    """Facts by library, None for one that is not to be had, or without pybind11.

    cpu: `variants`, {name: whether this machine runs it}, and the ones that serve `float32` and `bfloat16`:
    None where FUSEDRES_CPU_ISA is not a variant's name.
    cuda: `architectures` of its machine code and PTX, such as ["8.0", "9.0"], and `devices`, {name: facts of the
    kernels}.
    """
    module = _module()
    if module is None:
        return {"cpu": None, "cuda": None}
    return {"cpu": _cpu(module), "cuda": _cuda(module)}


def _module() -> ModuleType | None:
    found = build.library(HOST)
    if not isinstance(found, Library):
        return None
    loader = ExtensionFileLoader(HOST.name, str(found.path))
    spec = spec_from_loader(HOST.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


def _cpu(module: ModuleType) -> dict[str, Any] | None:
    found = build.library(NATIVE)
    return module.cpu(str(found.path)) if isinstance(found, Library) else None


def _cuda(module: ModuleType) -> dict[str, Any] | None:
    # Where torch can't use it, it is not built for the sake of its facts.
    found = build.library(CUDA) if torch.version.cuda else build.resolved(CUDA)
    if not isinstance(found, Library):
        return None
    listed = module.cuda_architectures(str(found.path)).split(",")
    devices = {}
    for index in range(torch.cuda.device_count()):
        with torch.cuda.device(index):
            devices[f"cuda:{index} {torch.cuda.get_device_name(index)}"] = module.cuda_kernels(str(found.path))
    return {"architectures": [f"{int(a) // 100}.{int(a) // 10 % 10}" for a in listed], "devices": devices}

"""doctor: every op on every backend against fp64, on small cases, and the fix for what is missing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from fusedres import build, compiler, dispatch, numerics, testing
from fusedres.backends import Window
from fusedres.machine import OPS
from fusedres.native_sources import NATIVE
from fusedres.testing import Case, Operands

OK, MISSING, FAILED = "ok", "missing", "FAILED"

# Small enough for seconds, and yet every branch of the formula: both layouts, half precision, an odd channel count.
_SHAPES = {"channels_last": (4, 35, 9, 7), "contiguous": (2, 64, 9, 9)}
_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
_FORMS = (("none", "none"), ("plain", "none"), ("projection", "sample"))


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was looked at, what came of it, and the fix where something is to be done."""

    subject: str
    status: str
    detail: str

    def __str__(self) -> str:
        return f"{self.status:8}{self.subject:32}{self.detail}".rstrip()


def examine() -> Iterator[Finding]:
    """Findings as they come; one that FAILED means wrong numbers or an error."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for backend in dispatch.ORDER:
        ops = [*filter(backend.computes, OPS)]
        served = [device for device in devices if backend.plain or device.upper() in backend.keys]
        for device in served:
            for op in ops:
                yield _op(backend.name, op, device)
        if ops and not served:
            yield Finding(f"backend {backend.name}", MISSING, _no_device())
    yield _compiler()
    yield _library()
    yield from _packages()


def cases(op: str) -> list[Case]:
    """What doctor tries: every form in both layouts and the common data types."""
    if op == "bn_act_pool":
        window = Window(*testing.WINDOWS[0])
        return [replace(case, op=op, window=window) for case in cases("bn_act") if case.residual == "none"]
    modes = ("training", "eval") if op == "bn_act" else ("eval",)
    return [
        Case(op, dtype, layout, shape, "normal", mode, residual, gate, "relu", "all", seed)
        for layout, shape in _SHAPES.items()
        for dtype in _DTYPES
        for mode in modes
        for seed, (residual, gate) in enumerate(_FORMS)
    ]


def _no_device() -> str:
    remedy = "check the driver: nvidia-smi" if torch.version.cuda else "install a torch that is built with CUDA"
    return f"torch finds no CUDA device, so nothing was tried; where there is an NVIDIA GPU, {remedy}"


def _op(backend: str, op: str, device: str) -> Finding:
    subject = f"{op} on {backend}, {device}"
    passed, objections = 0, dict[str, None]()
    for case in cases(op):
        try:
            rows = numerics.compare(case, device, run=partial(_forced, backend))
        except dispatch.Unserved as unserved:
            objections[unserved.reason] = None
            continue
        except Exception as error:  # whatever a broken kernel raises is the finding
            return Finding(subject, FAILED, f"{type(error).__name__}: {error} ({case})")
        wrong = [row for row in rows if row.fails_alone()]
        if wrong:
            error = f"{wrong[0].quantity} is off by {wrong[0].error:.1e}, eager by {wrong[0].eager_error:.1e}"
            return Finding(subject, FAILED, f"{error} ({case})")
        passed += 1
    if not passed:
        return Finding(subject, MISSING, "; ".join(objections))
    left_out = f"; not served: {'; '.join(objections)}" if objections else ""
    return Finding(subject, OK, f"{passed} cases agree with fp64{left_out}")


def _forced(backend: str, case: Case, given: Operands) -> Tensor:
    with dispatch.use_backend(backend):
        return testing.candidate(case, given)


def _compiler() -> Finding:
    try:
        return Finding("C++ compiler", OK, str(compiler.find()))
    except compiler.BuildError as error:
        return Finding("C++ compiler", MISSING, str(error))


def _library() -> Finding:
    found = build.library(NATIVE)
    if isinstance(found, build.Unavailable):
        return Finding("CPU library", MISSING, found.reason)
    return Finding("CPU library", OK, f"{found.path} ({found.origin})")


def _packages() -> Iterator[Finding]:
    """What is optional, and how to have it."""
    remedies = {
        "torchvision": ("models by name", "pip install torchvision"),
        "timm": ("models by name", "pip install timm"),
        "typer": ("bench, profile, tune, cache", "pip install 'fusedres[cli]'"),
        "rich": ("bench, profile, tune, cache", "pip install 'fusedres[cli]'"),
        "matplotlib": ("bench, profile, tune, cache", "pip install 'fusedres[cli]'"),
        "onnxruntime": ("bench --infer --peers", "pip install 'fusedres[peers]'"),
        "openvino": ("bench --infer --peers", "pip install 'fusedres[peers]'"),
    }
    for package, (purpose, remedy) in remedies.items():
        if find_spec(package) is None:
            yield Finding(package, MISSING, f"optional, for {purpose}: {remedy}")

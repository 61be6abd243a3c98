"""doctor: every op on every backend against fp64, on small cases, and the fix for what is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres import build, compiler, dispatch, numerics, testing
from fusedres.backends import NORM_OPS, Window
from fusedres.machine import CONVOLUTION
from fusedres.native_sources import NATIVE
from fusedres.ops import conv_act
from fusedres.testing import Case, Operands

OK, MISSING, FAILED = "ok", "missing", "FAILED"

# Small enough for seconds, and yet every branch of the formula: both layouts, half precision, an odd channel count.
_SHAPES = {"channels_last": (4, 35, 9, 7), "contiguous": (2, 64, 9, 9)}
_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
_FORMS = (("none", "none"), ("plain", "none"), ("projection", "sample"))
# x's sizes, the weight's, stride and padding: what ResNets have, at odd sizes.
_CONVOLUTIONS = (
    ((2, 16, 9, 7), (32, 16, 3, 3), 1, 1),
    ((3, 64, 6, 5), (16, 64, 1, 1), 1, 0),
    ((2, 3, 23, 17), (8, 3, 7, 7), 2, 3),
)


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
        ops = [*filter(backend.computes, NORM_OPS)]
        served = [device for device in devices if backend.plain or device.upper() in backend.keys]
        for device in served:
            for op in ops:
                yield _op(backend.name, op, device)
        if ops and not served:
            yield Finding(f"backend {backend.name}", MISSING, _no_device())
        if backend.computes(CONVOLUTION):
            yield from _tried([_convolution(backend.name, device) for device in devices])
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


def _tried(found: list[Finding]) -> list[Finding]:
    """Those of the devices that are served, or the reasons of all."""
    reasons = "; ".join(finding.detail for finding in found)
    return [f for f in found if f.status != MISSING] or [replace(found[0], detail=reasons)]


def _op(backend: str, op: str, device: str) -> Finding:
    checks = [(str(case), partial(_wrong_case, backend, device, case)) for case in cases(op)]
    return _finding(f"{op} on {backend}, {device}", checks)


def _finding(subject: str, checks: Iterable[tuple[str, Callable[[], str | None]]]) -> Finding:
    """Of all cases of an op on a backend; a check says what is wrong."""
    passed, objections = 0, dict[str, None]()
    for case, check in checks:
        try:
            wrong = check()
        except dispatch.Unserved as unserved:
            objections[unserved.reason] = None
            continue
        except Exception as error:  # whatever a broken kernel raises is the finding
            return Finding(subject, FAILED, f"{type(error).__name__}: {error} ({case})")
        if wrong is not None:
            return Finding(subject, FAILED, f"{wrong} ({case})")
        passed += 1
    if not passed:
        return Finding(subject, MISSING, "; ".join(objections))
    left_out = f"; not served: {'; '.join(objections)}" if objections else ""
    return Finding(subject, OK, f"{passed} cases agree with fp64{left_out}")


def _wrong_case(backend: str, device: str, case: Case) -> str | None:
    rows = numerics.compare(case, device, run=partial(_forced, backend))
    wrong = [row for row in rows if row.fails_alone()]
    return _off(wrong[0].quantity, wrong[0].error, wrong[0].eager_error) if wrong else None


def _off(quantity: str, error: float, eager: float) -> str:
    return f"{quantity} is off by {error:.1e}, eager by {eager:.1e}"


def _forced(backend: str, case: Case, given: Operands) -> Tensor:
    with dispatch.use_backend(backend):
        return testing.candidate(case, given)


def _convolution(backend: str, device: str) -> Finding:
    """conv_act on a backend, in every layout and data type."""
    generator, checks = torch.Generator("cpu").manual_seed(0), []

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device="cpu")

    for (shape, taps, stride, padding), layout, dtype in product(_CONVOLUTIONS, _SHAPES, _DTYPES):
        x, weight, bias = normal(*shape), normal(*taps), normal(taps[0])
        residual = normal(*F.conv2d(x, weight, bias, stride, padding).shape)
        operands = [t.to(device, dtype) for t in (x, weight, bias, residual)]
        order = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        operands = [t.contiguous(memory_format=order) if t.dim() == 4 else t for t in operands]
        case = f"{'x'.join(map(str, shape))} by {'x'.join(map(str, taps))}, {dtype}, {layout}"
        checks.append((case, partial(_wrong_convolution, backend, operands, stride, padding)))
    return _finding(f"{CONVOLUTION} on {backend}, {device}", checks)


@torch.no_grad()
def _wrong_convolution(backend: str, operands: list[Tensor], stride: int, padding: int) -> str | None:
    """Errors are in units of the summed terms."""
    x, weight, bias, residual = operands
    with dispatch.use_backend(backend):
        y = conv_act(x, weight, bias, residual=residual, stride=stride, padding=padding)
    wide = [t.double() for t in operands]
    exact, eager = (torch.relu(F.conv2d(x, w, b, stride, padding) + r) for x, w, b, r in (wide, operands))
    terms = F.conv2d(wide[0].abs(), wide[1].abs(), wide[2].abs(), stride, padding) + wide[3].abs()
    error, theirs = (((found.double() - exact).abs() / terms).max().item() for found in (y, eager))
    allowed = max(1.1 * theirs, 4 * torch.finfo(x.dtype).eps)
    return None if error <= allowed else _off("y", error, theirs)


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
        "onnxruntime": ("bench --infer", "pip install 'fusedres[peers]'"),
        "openvino": ("bench --infer", "pip install 'fusedres[peers]'"),
    }
    for package, (purpose, remedy) in remedies.items():
        if find_spec(package) is None:
            yield Finding(package, MISSING, f"optional, for {purpose}: {remedy}")

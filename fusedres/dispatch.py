"""Which backend serves a call: an ordered list, the reference last, and the first without an objection.

Where several have kernels for a norm on a GPU, and were timed there, it is the fastest of them for that size class.

FUSEDRES_BACKEND forces a backend, FUSEDRES_DISABLE=1 sends every block to its eager path, and FUSEDRES_MIN_ELEMENTS
says from what size of input on a block on a CPU leaves that path; all are read once, at import.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from fusedres import times
from fusedres.backends import (
    CONVOLUTIONS,
    Backend,
    Request,
    TrainingConvolution,
    cuda,
    cudnn,
    native,
    onednn,
    ranking,
    reference,
    triton,
)

# A kernel tells the backward in one byte which value of a window was the largest, and 255 that none was.
MOST_POSITIONS = 255

ORDER: list[Backend] = [
    native.BACKEND,
    triton.BACKEND,
    cuda.BACKEND,
    onednn.BACKEND,
    cudnn.BACKEND,
    reference.BACKEND,
]


def _number(given: str) -> int:
    if not given.isdecimal():
        raise ValueError(f"FUSEDRES_MIN_ELEMENTS must be a number of elements; got {given!r}")
    return int(given)


# Module globals and not ContextVars: torch.compile guards on the first and breaks on the second.
_forced: str | None = None
disabled: bool = os.environ.get("FUSEDRES_DISABLE", "0") not in ("", "0")
# In smaller tensors a pass over memory that is saved is worth less than a call from Python costs.
min_elements: int = _number(os.environ.get("FUSEDRES_MIN_ELEMENTS") or "262144")
# With the threads that measured times have to be for.
_chosen: dict[tuple[Request, int], Backend] = {}
_convolving: dict[tuple[Request, int], Convolving] = {}
_MOST_CHOSEN = 4096


@dataclass(frozen=True)
class Choice:
    """What one call of a block came to: an op's backend and why not the others, or why the eager path was taken."""

    block: str
    op: str
    backend: str
    objections: Mapping[str, str]


class Convolving(NamedTuple):
    """Who computes a convolution of a training step, how, and what its functions are told beside their operands."""

    backend: Backend
    convolution: TrainingConvolution
    chosen: tuple[Any, ...]


class Unserved(RuntimeError):  # noqa: N818  it is an answer
    """The forced backend can't serve a request; `reason` is its objection."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"backend {name!r} was asked for, but {reason}")
        self.reason = reason


class Recorder:
    """Collects every choice made in a model's forward, under the block's name."""

    def __init__(self, model: nn.Module) -> None:
        self._names = {module: name for name, module in model.named_modules()}
        self._block = ""
        self.choices: list[Choice] = []

    @contextmanager
    def inside(self, block: nn.Module, eager_because: str | None) -> Iterator[None]:
        """Choices made inside are the block's, but for those of a block within it."""
        outer, self._block = self._block, self._names.get(block, "")
        if eager_because is not None:
            self.choices.append(Choice(self._block, "block", "eager path", {"fused": eager_because}))
        try:
            yield
        finally:
            self._block = outer

    def add(self, request: Request, chosen: Backend, measured: str | None = None) -> None:
        """Note who serves a request, and the times that name it, where any do."""
        reasons = objections(request) | ({} if measured is None else {"measured": measured})
        reasons.pop(chosen.name, None)  # its reserve, where it was measured or forced
        self.choices.append(Choice(self._block, request.op, chosen.name, reasons))


recorder: Recorder | None = None


def backend(name: str) -> Backend:
    """The backend of that name."""
    for candidate in ORDER:
        if candidate.name == name:
            return candidate
    raise ValueError(f"backend must be one of {', '.join(b.name for b in ORDER)}; got {name!r}")


def candidates(op: str) -> list[Backend]:
    """The backends that have the op, in order."""
    return [candidate for candidate in ORDER if candidate.computes(op)]


def choose(request: Request) -> Backend:
    """The first backend that the rule may name, or the forced one, which serves or raises."""
    found = serving(request)
    if recorder is not None and not request.compiling:
        recorder.add(request, found, ranking.words(request, found.name))
    return found


def serving(request: Request) -> Backend:
    """The backend that `choose` would return, nothing being recorded."""
    if request.compiling:  # torch.compile guards on what this reads; a cache would hide it
        return _first(request)
    key = request, times.threads()
    found = _chosen.get(key)
    if found is None:
        found = _chosen[key] = _first(request)
    return found


def _first(request: Request) -> Backend:
    if _forced is not None:
        candidate = backend(_forced)
        reason = objection(candidate, request)
        if reason is not None:
            raise Unserved(_forced, reason)
        return candidate
    for candidate in _in_order(request):
        if candidate.reserve(request.op) is None and objection(candidate, request) is None:
            return candidate
    raise RuntimeError(f"no backend serves {request}")


def _in_order(request: Request) -> list[Backend]:
    """The backends that have the op, the one that measured times name before all others."""
    found = candidates(request.op)
    fastest = ranking.fastest(request, tuple(c.name for c in found if request.device.upper() in c.keys))
    return [c for c in found if c.name == fastest] + [c for c in found if c.name != fastest]


def convolving(request: Request) -> Convolving:
    """How a training step's convolution is computed.

    aten does where no other backend, or not the forced one, can: that is no choice to be recorded, unless it was
    measured.
    """
    key = request, times.threads()
    found = _convolving.get(key)
    if found is None:
        if len(_convolving) >= _MOST_CHOSEN:  # the requests tell sizes, of which there may be any number
            _convolving.clear()
        refused = _forced is not None and objection(backend(_forced), request) is not None
        serves = reference.BACKEND if refused else _first(request)
        convolution = serves.training_convolution
        assert convolution is not None  # it serves "conv"
        found = _convolving[key] = Convolving(serves, convolution, convolution.choose(request))
    if recorder is not None:
        served = (b.training_convolution for b in candidates(request.op))
        measured = next(filter(None, (c.measured(request) for c in served if c is not None)), None)
        if measured is not None or found.backend is not reference.BACKEND:
            recorder.add(request, found.backend, measured)
    return found


def objection(candidate: Backend, request: Request) -> str | None:
    """Why a backend can't serve a request: what holds for all kernels, then its own reason."""
    if not candidate.computes(request.op):
        return f"it has no {request.op}"
    if candidate.keys and request.op not in CONVOLUTIONS:
        if request.device.upper() not in candidate.keys:
            return f"it has no kernels for {request.device} tensors"
        if candidate.kernels and f"{request.op}_forward" not in candidate.kernels:
            return f"it has no kernels for {request.op}"
        if request.empty:
            return "x is empty"
        if request.subclass:
            return "x is a tensor subclass, which kernels do not see through"
        if request.window_positions > MOST_POSITIONS:
            return f"kernels pool windows of at most {MOST_POSITIONS} values, not {request.window_positions}"
        if request.window_positions and request.act not in ("identity", "relu"):
            return f"kernels pool after relu or identity, not after {request.act}"
    return candidate.objection(request)


def objections(request: Request) -> dict[str, str]:
    """Every backend's objection to `request`, or why the rule doesn't name it; those without either left out."""
    reasons = {c.name: objection(c, request) or c.reserve(request.op) for c in candidates(request.op)}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def clear() -> None:
    """Forget cached choices: for whoever changes ORDER or what a backend objects to."""
    _chosen.clear()
    _convolving.clear()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend: it runs, or raises with its objection; never a silent fallback.

    The choice holds for the whole process, not for one thread.

    >>> import fusedres
    >>> with fusedres.use_backend("reference"):
    ...     y = fusedres.ops.affine_act(torch.ones(1, 2, 3, 3), act="relu")
    """
    previous = _forced
    force(name)
    try:
        yield
    finally:
        force(previous)


def is_forced() -> bool:
    """Whether somebody asked for one backend."""
    return _forced is not None


@contextmanager
def any_size() -> Iterator[None]:
    """Have inputs of every size fused."""
    global min_elements
    previous, min_elements = min_elements, 0
    try:
        yield
    finally:
        min_elements = previous


def force(name: str | None) -> None:
    """Force one backend until further notice; None lifts it."""
    global _forced
    _forced = None if name is None else backend(name).name
    times.is_backend_forced = _forced is not None
    clear()


@contextmanager
def recording(model: nn.Module) -> Iterator[list[Choice]]:
    """Collect the choices of `model`'s blocks made inside."""
    global recorder
    previous, recorder = recorder, Recorder(model)
    try:
        yield recorder.choices
    finally:
        recorder = previous


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def layout(t: torch.Tensor) -> str:
    """The word for a tensor's memory order, as Request has it.

    >>> layout(torch.empty(2, 3, 4, 4).to(memory_format=torch.channels_last))
    'channels_last'
    """
    contiguous = t.is_contiguous()
    interleaved = _CHANNELS_LAST.get(t.dim())
    if interleaved is not None and t.is_contiguous(memory_format=interleaved):
        return "both" if contiguous else "channels_last"
    return "contiguous" if contiguous else "strided"

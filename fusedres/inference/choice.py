"""Who computes a convolution of given sizes, and in which form: whom the dispatcher names, or who was measured fastest.

Times are taken inside `measuring` only, once for each problem, and kept in the user's cache for other processes. The
dispatcher's first stays unless another is clearly faster. FUSEDRES_TUNE=0, deterministic algorithms and a forced
backend leave it to the dispatcher alone.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedres import build, dispatch
from fusedres.backends import Backend, Convolution, Geometry, Pack, Request
from fusedres.cache import Refused
from fusedres.host import cpu_name
from fusedres.native_sources import NATIVE
from fusedres.tables import Table, Unusable

Times = Mapping[str, float]  # milliseconds by candidate

_FORMAT = 1
_GAIN = 0.9  # what share of the first one's time another may take at most to come before it
_ROUNDS = 7  # at least
_AGREEMENT = 1.1  # within which the three least times of a candidate must lie
_CACHE_BYTES = 1 << 27  # more than a core's share of any cache
_SECONDS = 1.0  # after which a problem that does not settle is left to the rule


class Problem(NamedTuple):
    """A convolution's sizes: the weight's and x's."""

    weight: Sequence[int]
    geometry: Geometry
    sizes: Sequence[int]


class Candidate(NamedTuple):
    """A backend, with one of its ways to pack."""

    backend: Backend
    form: str
    pack: Pack

    @property
    def name(self) -> str:
        return f"{self.backend.name} {self.form}".rstrip()

    @property
    def convolution(self) -> Convolution:
        assert self.backend.convolution is not None  # `_candidates`
        return self.backend.convolution


class Choice(NamedTuple):
    """The candidate that computes a convolution, and the times that it was chosen by, if it was."""

    candidate: Candidate
    times: Times

    @property
    def reason(self) -> str | None:
        """The times in words, the chosen one's first."""
        names = sorted(self.times, key=lambda name: (name != self.candidate.name, self.times[name]))
        return ", ".join(f"{name} {self.times[name]:.3g} ms" for name in names) or None


CallOf = Callable[[Candidate], Callable[[], object]]  # a call of a candidate to be timed

_measured: ContextVar[set[Table] | None] = ContextVar("measured", default=None)
_read: dict[Path, dict[str, Times]] = {}  # what a file held when it was first asked for, and what was measured since


@contextmanager
def measuring() -> Iterator[None]:
    """Take the times of what is bound inside and not known yet; they are kept at the end."""
    found: set[Table] = set()
    token = _measured.set(found)
    try:
        yield
    finally:
        _measured.reset(token)
        for table in found:
            try:
                table.save(_known(table))
            except (OSError, Refused) as error:
                warnings.warn(f"what was measured of convolutions is not kept: {error}", stacklevel=2)


def choose(request: Request, problem: Problem, x: Tensor, call_of: CallOf) -> Choice:
    """Who is to compute a convolution."""
    candidates = _candidates(request, problem)
    times = _times(request, problem, candidates, x, call_of) if len(candidates) > 1 and _is_on(problem) else {}
    by_name = {candidate.name: candidate for candidate in candidates}
    if not by_name.keys() <= times.keys():
        choice = Choice(candidates[0], {})
    else:
        times = {name: times[name] for name in by_name}
        fastest = min(times, key=times.__getitem__)
        first = candidates[0]
        choice = Choice(by_name[fastest] if times[fastest] < _GAIN * times[first.name] else first, times)
    if dispatch.recorder is not None:
        dispatch.recorder.add(request, choice.candidate.backend, choice.reason)
    return choice


def _candidates(request: Request, problem: Problem) -> list[Candidate]:
    """Every form of every backend without an objection, the dispatcher's choice first. On a CPU the reference computes
    what nobody else does: its convolution is oneDNN's, followed by more passes."""
    backends = [dispatch.serving(request)]
    served = [b for b in dispatch.candidates(request.op) if dispatch.objection(b, request) is None]
    backends += [b for b in served if b is not backends[0] and (request.device != "cpu" or not b.plain)]
    found = []
    for backend in backends:
        assert backend.convolution is not None  # the dispatcher asks those that have one
        convolution = backend.convolution
        forms = {"": convolution.pack} if convolution.forms is None else convolution.forms(*problem, request.dtype)
        found += [Candidate(backend, form, pack) for form, pack in forms.items()]
    return found


def _is_on(problem: Problem) -> bool:
    chosen = os.environ.get("FUSEDRES_TUNE") or "1"
    if chosen not in ("0", "1"):
        raise ValueError(f"FUSEDRES_TUNE must be 0 or 1; got {chosen!r}")
    if dispatch.is_forced() or torch.are_deterministic_algorithms_enabled():
        return False
    return chosen == "1" and math.prod(problem.sizes) > 0


def _times(request: Request, problem: Problem, candidates: list[Candidate], x: Tensor, call_of: CallOf) -> Times:
    """What is known of a problem, or is measured now."""
    table, entry = _table(request.device), _entry(request, problem)
    known = _known(table)
    times = known.get(entry, {})
    found = _measured.get()
    if found is not None and not {candidate.name for candidate in candidates} <= times.keys():
        times = _measure({candidate.name: call_of(candidate) for candidate in candidates}, x)
        if times:
            known[entry] = times
            found.add(table)
    return times


def _measure(calls: Mapping[str, Callable[[], object]], x: Tensor) -> Times:
    """The third least time of each, as in a network: x in the caches, the weights not, after those of other layers.

    What else the machine does makes none of them faster; where it does so much that the least times differ, nothing.
    """
    wait = torch.cuda.synchronize if x.device.type == "cuda" else lambda: None
    others = torch.zeros(_CACHE_BYTES // 4, device=x.device)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    end = time.perf_counter() + _SECONDS
    while not all(map(_is_settled, samples.values())):
        if time.perf_counter() > end:
            return {}
        for name, call in calls.items():
            others.sum()
            x.sum()
            wait()
            start = time.perf_counter()
            call()
            wait()
            samples[name].append(1e3 * (time.perf_counter() - start))
    return {name: sorted(times)[2] for name, times in samples.items()}


def _is_settled(times: list[float]) -> bool:
    return len(times) >= _ROUNDS and sorted(times)[2] <= min(times) * _AGREEMENT


def _entry(request: Request, problem: Problem) -> str:
    """What a time is for; an instruction set that was asked for, and the threads, count as sizes do."""
    weight, (stride, padding, dilation, groups), sizes = problem
    isa = os.environ.get("FUSEDRES_CPU_ISA") or "best"
    where = f"{torch.get_num_threads()} threads/{isa}" if request.device == "cpu" else "cuda"
    lists = "/".join("x".join(map(str, values)) for values in (sizes, weight, stride, padding, dilation))
    joined = "" if request.residual_dtype is None else "+add"
    return f"{where}/{str(request.dtype).removeprefix('torch.')}/{lists}/{groups}/{request.act}{joined}"


def _known(table: Table) -> dict[str, Times]:
    found = _read.get(table.path)
    if found is None:
        found = _read[table.path] = dict(table.load(_positive))
    return found


def _table(device: str) -> Table:
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    library = build.library(NATIVE) if device == "cpu" else None
    kernels = library.path.parent.name if isinstance(library, build.Library) else "none"
    header = {"format": _FORMAT, "device": name, "torch": torch.__version__, "kernels": kernels}
    return Table(f"convolutions {name}", tuple(header.items()), "times of convolutions", "optimize measures them again")


def _positive(entries: Mapping[str, Any]) -> Mapping[str, Times]:
    for entry, times in entries.items():
        if not all(isinstance(ms, float) and 0 < ms < math.inf for ms in times.values()):
            raise Unusable(f"{entry} has a time that is none")
    return entries

"""Who computes a convolution of given sizes, and in which form: whom the dispatcher names, or who was measured fastest.

A problem that is bound inside `times.measuring` is timed once, with the operands that it was bound with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from fusedres import dispatch, times
from fusedres.backends import Backend, Convolution, Geometry, Pack, Request
from fusedres.times import Times


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
        """The times in words."""
        return times.words(self.candidate.name, self.times) if self.times else None


CallOf = Callable[[Candidate], Callable[[], object]]  # a call of a candidate to be timed


def choose(request: Request, problem: Problem, x: Tensor, call_of: CallOf) -> Choice:
    """Who is to compute a convolution."""
    by_name = {candidate.name: candidate for candidate in _candidates(request, problem)}
    found = _times(request, problem, by_name, x, call_of)
    name = times.fastest([*by_name], found)
    if name is None:
        choice = Choice(next(iter(by_name.values())), {})
    else:
        choice = Choice(by_name[name], {name: found[name] for name in by_name})
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


def _times(
    request: Request, problem: Problem, candidates: Mapping[str, Candidate], x: Tensor, call_of: CallOf
) -> Times:
    """What is known of a problem, or is measured now."""
    if len(candidates) < 2 or not times.are_used() or not math.prod(problem.sizes):
        return {}
    entry = _entry(request, problem)
    found = times.known(request.device, entry)
    if times.is_measuring() and not candidates.keys() <= found.keys():
        calls = {name: call_of(candidate) for name, candidate in candidates.items()}
        found = times.take(request.device, entry, calls, [x])
    return found


def _entry(request: Request, problem: Problem) -> str:
    """What a time is for."""
    weight, (stride, padding, dilation, groups), sizes = problem
    lists = "/".join("x".join(map(str, values)) for values in (sizes, weight, stride, padding, dilation))
    joined = "" if request.residual_dtype is None else "+add"
    dtype = str(request.dtype).removeprefix("torch.")
    return f"{times.where(request.device)}/{dtype}/{lists}/{groups}/{request.act}{joined}"

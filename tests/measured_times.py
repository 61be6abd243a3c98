"""Times that tests make up, in a table of their own, and what leaves the choice to the rule nevertheless."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fusedres
from fusedres import dispatch, times
from fusedres.backends import Geometry, native_training
from fusedres.backends.native_training import Problem
from fusedres.times import Calls, Times

PADDED = Geometry(padding=(1, 1))
BY_RULE = ("FUSEDRES_TUNE", "deterministic", "forced")
Asked = list[list[str]]


def forget() -> None:
    """As in a new process."""
    times._read.clear()
    dispatch.clear()


@pytest.fixture
def fresh_times(native: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Times may choose, and a folder of its own keeps them; the library is loaded already."""
    monkeypatch.setenv("FUSEDRES_CACHE", str(tmp_path / "cache"))
    torch.use_deterministic_algorithms(False)
    forget()
    yield
    torch.use_deterministic_algorithms(True, warn_only=True)
    forget()


def pretend(monkeypatch: pytest.MonkeyPatch, found: Mapping[str, float]) -> Asked:
    """Have measuring return these times, and 2 ms for every other candidate; returns who was measured."""
    asked: Asked = []

    def measure(calls: Calls, warm: Sequence[Tensor]) -> Times:
        asked.append(list(calls))
        for call in calls.values():
            call()
        return {name: found.get(name, 2.0) for name in calls}

    monkeypatch.setattr(times, "measure", measure)
    return asked


def forge(chosen: Mapping[str, str], dtype: torch.dtype = torch.float32) -> None:
    """Keep times that name candidates for results of the convolutions of `block_and_input`'s own block."""
    problems = [Problem(result, (4, 32, 16, 16), (32, 32, 3, 3), PADDED, dtype) for result in chosen]
    entries = {
        problem.entry: {name: 2.0 - (name == chosen[problem.result]) for name in native_training.candidates(problem)}
        for problem in problems
    }
    times.table_of("cpu").save(entries)
    forget()


@contextmanager
def by_rule(how: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leave the choice to the rule inside, in one of the ways of `BY_RULE`."""
    torch.use_deterministic_algorithms(how == "deterministic")
    try:
        with monkeypatch.context() as patch, fusedres.use_backend("native") if how == "forced" else nullcontext():
            if how == "FUSEDRES_TUNE":
                patch.setenv("FUSEDRES_TUNE", "0")
            yield
    finally:
        torch.use_deterministic_algorithms(False)

"""How `pytest benchmarks/` measures: contestants take turns in one process, each only after its results were checked.

    pytest benchmarks/ --benchmark-only            everything
    pytest benchmarks/ --benchmark-only --quick    two minutes: small shapes, few rounds

pytest-benchmark times one function after the other, and a clock that drifts in between decides who wins. So the first
test of a case races all its contestants (`fusedres.bench.timing.interleave`), and every contestant's test then reports
its own samples of that race: the table, the JSON and the comparison of runs are pytest-benchmark's as usual.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

import fusedres
from fusedres.bench.timing import interleave, samples_ms, speedup

ROOT = Path(__file__).parents[1]
PAGES_KEPT = "MALLOC_TOP_PAD_"


@dataclass(frozen=True)
class Contestant:
    """One way to run a case.

    Args:
        run: the timed call.
        check: raises where its results are wrong; it runs before anything is timed. Returns facts for the report.
    """

    run: Callable[[], object]
    check: Callable[[], Mapping[str, object]]


@dataclass(frozen=True)
class Budget:
    """How long a race may take."""

    rounds: int
    sample_ms: float
    seconds: float


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="small shapes and few rounds, for a smoke test")


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--quick")


@pytest.fixture(scope="session", autouse=True)
def threads() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.fixture(scope="session")
def budget(quick: bool) -> Budget:
    return Budget(rounds=5, sample_ms=2.0, seconds=1.0) if quick else Budget(rounds=25, sample_ms=20.0, seconds=20.0)


@pytest.fixture(scope="session")
def copy_gbps(quick: bool) -> float:
    """Bandwidth of a copy between two 50 MB tensors, bytes read and written."""
    source = torch.rand(50_000_000 // 4)
    target = torch.empty_like(source)
    times = samples_ms(lambda: target.copy_(source), torch.device("cpu"), count=5 if quick else 15, sample_ms=20.0)
    return 2 * source.numel() * 4 / median(times) / 1e6


@pytest.fixture(scope="session")
def machine() -> dict[str, object]:
    """What a number means nothing without."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "fusedres": fusedres.__version__,
        "commit": commit.stdout.strip() or None,
        "malloc": "pages kept" if PAGES_KEPT in os.environ else "default",
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


class Replay:
    """A clock for pytest-benchmark that tells each round's time from a race that was run before."""

    def __init__(self, samples_ms: list[float]) -> None:
        self.ticks = self._ticks(samples_ms)

    @staticmethod
    def _ticks(samples_ms: list[float]) -> Iterator[float]:
        now = 0.0
        for sample in samples_ms:
            yield now
            now += sample / 1e3
            yield now

    def __call__(self) -> float:
        return next(self.ticks)


Race = Callable[[Any, Hashable, str, Callable[[], Mapping[str, Contestant]]], list[float]]


@pytest.fixture(scope="session")
def _races() -> dict[Hashable, tuple[dict[str, list[float]], dict[str, Mapping[str, object]]]]:
    return {}


@pytest.fixture
def race(_races: dict, budget: Budget, machine: dict[str, object]) -> Race:
    """race(benchmark, case, name, contestants): report `name`'s samples of the case's one race."""

    def report(
        benchmark: Any, case: Hashable, name: str, contestants: Callable[[], Mapping[str, Contestant]]
    ) -> list[float]:
        if case not in _races:
            _races.clear()  # one case's tensors at a time
            _races[case] = _run(contestants(), budget)
        samples, facts = _races[case]
        ratio = speedup(samples["eager"], samples[name])
        benchmark.extra_info.update(
            {**machine, **facts[name], "speedup": ratio.median, "speedup_95": [ratio.low, ratio.high]}
        )
        benchmark._timer = Replay(samples[name])
        benchmark.pedantic(_nothing, rounds=len(samples[name]), iterations=1)
        return samples[name]

    return report


def _run(
    contestants: Mapping[str, Contestant], budget: Budget
) -> tuple[dict[str, list[float]], dict[str, Mapping[str, object]]]:
    facts = {name: contestant.check() for name, contestant in contestants.items()}
    calls = {name: contestant.run for name, contestant in contestants.items()}
    rounds = list(
        interleave(
            calls,
            torch.device("cpu"),
            rounds=budget.rounds,
            sample_ms=budget.sample_ms,
            seconds=budget.seconds,
        )
    )
    return {name: [times[name] for times in rounds] for name in calls}, facts


def _nothing() -> None:
    """What pytest-benchmark believes to time."""


sys.path.insert(0, str(ROOT))

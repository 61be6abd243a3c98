"""How `pytest benchmarks/` measures: contestants take turns in one process, each only after its results were checked.

    pytest benchmarks/ --benchmark-only            everything
    pytest benchmarks/ --benchmark-only --quick    two minutes: small shapes, few rounds, no compiled networks
    pytest benchmarks/test_ops.py --benchmark-only -k "16x512x28x28 and bfloat16"    some cases: -k takes parts of names

pytest-benchmark times one function after the other, and a clock that drifts in between decides who wins. So the first
test of a case races all its contestants (`fusedres.bench.timing.interleave`), and every contestant's test then reports
its own samples of that race: the table, the JSON and the comparison of runs are pytest-benchmark's as usual.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from torch import nn

from fusedres.bench import ceilings, comparison, roofline
from fusedres.bench.ceilings import Ceilings
from fusedres.bench.comparison import Result
from fusedres.bench.contestants import Entry
from fusedres.bench.timing import interleave, speedup
from fusedres.bench.work import Step, Work
from fusedres.machine import PACKAGES, conditions, version

ROOT = Path(__file__).parents[1]
LOOP = "loop, same bytes"  # the contestant that shows what the others could reach at best
FACTS = {"device", "threads", "torch", "fusedres", "commit", "malloc", "python", "peak_bytes", "speedup", "speedup_95"}
RATES = ({"GB/s", "share of copy bandwidth"}, {"images/s", "share of matmul peak"})


@dataclass(frozen=True)
class Contestant:
    """One way to run a case.

    Args:
        run: the timed call.
        check: raises where its results are wrong; it runs before anything is timed. Returns facts for the report.
        absent: why it can't take part.
    """

    run: Callable[[], object]
    check: Callable[[], Mapping[str, object]]
    absent: str | None = None


@dataclass(frozen=True)
class Budget:
    """How long a race may take."""

    rounds: int
    sample_ms: float
    seconds: float


def pytest_configure(config: pytest.Config) -> None:
    # Times that an older library took are taken again: no reason not to measure.
    stale = "ignore:the times of convolutions in .* are ignored, because its:UserWarning"
    config.addinivalue_line("filterwarnings", stale)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="small shapes and few rounds, for a smoke test")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for every contestant of every case in the module's `races(quick)`, {case: names of contestants}."""
    if "contestant" not in metafunc.fixturenames:
        return
    races = metafunc.module.races(metafunc.config.getoption("--quick"))
    pairs = [(case, contestant) for case, contestants in races.items() for contestant in contestants]
    metafunc.parametrize("case, contestant", pairs, ids=[f"{case}-{contestant}" for case, contestant in pairs])


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list, output_json: dict) -> None:
    """Keep the command beside the numbers, but for where they were written."""
    output_json["command"] = shlex.join(["pytest", *_without_file(config.invocation_params.args)])


def _without_file(words: Sequence[str]) -> Iterator[str]:
    option = "--benchmark-json"
    for before, word in zip(("", *words), words, strict=False):
        if before != option and word.partition("=")[0] != option:
            yield word


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--quick")


@pytest.fixture(scope="session", autouse=True)
def threads() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.fixture(scope="session")
def budget(quick: bool) -> Budget:
    return Budget(rounds=5, sample_ms=2.0, seconds=1.0) if quick else Budget(rounds=25, sample_ms=20.0, seconds=90.0)


@pytest.fixture(scope="session")
def ceiling(quick: bool) -> Callable[[torch.dtype], Ceilings]:
    """ceiling(dtype): the CPU's copy bandwidth and matmul peak, measured once."""
    return lru_cache(lambda dtype: ceilings.measure(torch.device("cpu"), dtype, samples=3 if quick else 15))


@pytest.fixture(scope="session")
def machine() -> Mapping[str, object]:
    """What a number means nothing without."""
    return {**conditions(), **{package: version(package) for package in PACKAGES}}


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


@pytest.fixture(autouse=True)
def complete(request: pytest.FixtureRequest) -> Iterator[None]:
    """No result without what it means nothing without."""
    facts = request.getfixturevalue("benchmark").extra_info if "race" in request.fixturenames else {}
    yield
    if facts:
        rates = [rate for rate in RATES if rate <= facts.keys()]
        missing = FACTS - facts.keys()
        assert rates and not missing and any(name.startswith("error ") for name in facts), (missing, facts)


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
        if name not in samples:
            pytest.skip(f"{name}: {facts[name]['absent']}")
        ratio = speedup(samples["eager"], samples[name])
        benchmark.extra_info.update(
            {**machine, **facts[name], "speedup": ratio.median, "speedup_95": [ratio.low, ratio.high]}
        )
        if LOOP in samples:
            of_loop = speedup(samples[LOOP], samples[name])
            benchmark.extra_info.update(of_loop=of_loop.median, of_loop_95=[of_loop.low, of_loop.high])
        benchmark._timer = Replay(samples[name])
        benchmark.pedantic(_nothing, rounds=len(samples[name]), iterations=1)
        return samples[name]

    return report


def _run(
    contestants: Mapping[str, Contestant], budget: Budget
) -> tuple[dict[str, list[float]], dict[str, Mapping[str, object]]]:
    facts = {name: contestant.check() for name, contestant in contestants.items()}
    calls = {name: contestant.run for name, contestant in contestants.items() if contestant.absent is None}
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


def whole(model: nn.Module, work: Work, entries: Mapping[str, Entry]) -> dict[str, Contestant]:
    """The contestants of a block or a network, already checked against fp64."""
    found = comparison.begin(work)
    steps = comparison.prepare(model, work, entries, found, lambda name: None)
    shape = (work.batch, work.channels, work.size, work.size)
    layers = roofline.layers(model, shape, training=work.training, dtype=work.dtype)
    gflop = sum(layer.flops.total for layer in layers) / 1e9
    return {result.name: _checked(result, steps.get(result.name), gflop) for result in found.results}


def _checked(result: Result, step: Step | None, gflop: float) -> Contestant:
    if step is None:
        return Contestant(_nothing, lambda: {"absent": result.absent}, result.absent)
    errors = {f"error {quantity}": error for quantity, error in result.errors.items()}
    return Contestant(step, lambda: {**errors, "peak_bytes": result.peak_bytes, "GFLOP": gflop})


def add_rates(benchmark: Any, work: Work, samples_ms: list[float], ceilings: Ceilings) -> None:
    """Images and FLOPs a second, and the share of the matmul peak that these are."""
    seconds = median(samples_ms) / 1e3
    rate = benchmark.extra_info["GFLOP"] / seconds
    benchmark.extra_info |= {
        "images/s": work.batch / seconds,
        "GFLOP/s": rate,
        "share of matmul peak": rate * 1e9 / ceilings.matmul,
    }


def _nothing() -> None:
    """What pytest-benchmark believes to time."""


sys.path.insert(0, str(ROOT))

"""The paired comparison: contestants are checked against fp64, then timed in turn, round by round."""

from __future__ import annotations

import csv
import gc
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import nn

from fusedres import fusion, machine
from fusedres.bench.contestants import BASELINE, FUSED, Absent, Entry
from fusedres.bench.timing import Ratio, interleave, speedup
from fusedres.bench.work import Outcome, Step, Work, exact, peak_bytes, settle
from fusedres.blocks.block import Block
from fusedres.verification import bar, relative_error

WARM_UPS = 2
SAMPLE_MS = 10.0
# What a peer may be off by, beside what fusedres may: it rounds as it likes, and still computes the same function.
_PEER = 10.0
# Beyond this a result says nothing: zeros would do as well.
_HOPELESS = 0.7

Notice = Callable[[str], None]


class WrongResults(Exception):  # noqa: N818  the message says the rest
    """A contestant's results are wrong; it is not timed."""


@dataclass
class Result:
    """One contestant: why it's absent, or its errors against fp64, milliseconds of each round and peak memory."""

    name: str
    absent: str | None = None
    errors: dict[str, float] = field(default_factory=dict)
    samples_ms: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    ratio: Ratio | None = None
    images_per_second: float | None = None


@dataclass
class Comparison:
    """All contestants side by side, complete or as far as it came before it was interrupted.

    Args:
        work: in words.
        conditions: device, threads, versions, commit and malloc mode.
        command: what repeats it.
        complete: whether it came to its end, by its rounds or by its seconds.
    """

    work: str
    conditions: Mapping[str, object]
    results: list[Result]
    command: str = ""
    complete: bool = False

    def rows(self) -> Iterator[dict[str, object]]:
        """One flat row a contestant."""
        for result in self.results:
            ratio = result.ratio
            yield {
                "contestant": result.name,
                "absent": result.absent,
                "rounds": len(result.samples_ms),
                "median_ms": median(result.samples_ms) if result.samples_ms else None,
                "images_per_second": result.images_per_second,
                "speedup": ratio.median if ratio else None,
                "speedup_low": ratio.low if ratio else None,
                "speedup_high": ratio.high if ratio else None,
                "peak_bytes": result.peak_bytes,
                **{f"error {quantity}": error for quantity, error in result.errors.items()},
            }

    def csv(self) -> str:
        """The rows, after the conditions in columns of their own."""
        rows = [{"work": self.work, "command": self.command, **self.conditions, **row} for row in self.rows()]
        columns = list(dict.fromkeys(column for row in rows for column in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns)
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()


def prepare(
    model: nn.Module, work: Work, entries: Mapping[str, Entry], comparison: Comparison, notice: Notice
) -> dict[str, Step]:
    """Build every contestant and check its results; the comparison gets a result of each as it goes.

    Raises where fusedres or the first contestant is wrong or fails; a peer that is or does is left out.
    """
    fusion.unfuse(model)
    if any(isinstance(module, Block) for module in model.modules()):
        raise Absent("this model is built of fusedres's own blocks; name torchvision's or timm's model instead")
    settle(model)
    model.to(work.device)
    notice("fp64")
    truth = exact(model, work)
    steps: dict[str, Step] = {}
    eager: dict[str, float] = {}
    for name, entry in entries.items():
        notice(name)
        result = Result(name)
        comparison.results.append(result)
        try:
            step = entry(model, work)
            result.errors = _errors(step.outcome(), truth)
            eager = eager or result.errors
            _check(name, result.errors, eager)
            for _ in range(WARM_UPS):
                step()
            result.peak_bytes = None if _is_foreign(step) else peak_bytes(step, work.device)
            steps[name] = step
        except Absent as absent:
            result.absent = str(absent)
        except Exception as error:  # whatever a peer makes of a model
            if name.startswith(FUSED) or not steps:
                raise
            result.absent = str(error) if isinstance(error, WrongResults) else f"it fails: {_line(error)}"
        gc.collect()
    return steps


def _line(error: Exception) -> str:
    """The kind of an error, and how its message begins."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def _is_foreign(step: Step) -> bool:
    """Whether the step's memory isn't torch's to count."""
    return not isinstance(getattr(step, "model", getattr(step, "forward", None)), nn.Module)


def _errors(outcome: Outcome, truth: Outcome) -> dict[str, float]:
    return {quantity: relative_error(outcome[quantity], true) for quantity, true in truth.items()}


def _check(name: str, errors: Mapping[str, float], eager: Mapping[str, float]) -> None:
    slack = 1.0 if name == BASELINE or name.startswith(FUSED) else _PEER
    for quantity, error in errors.items():
        allowed = min(slack * bar(quantity, eager[quantity], torch.finfo(torch.float32).eps), _HOPELESS)
        if name == BASELINE and not error <= allowed:
            raise WrongResults(
                f"{name}: its {quantity} are off by {error:.1e} relative to fp64: the model draws at random, or makes "
                "rounding large; nothing can be compared with that"
            )
        if not error <= allowed:
            raise WrongResults(
                f"{name}: its {quantity} are off by {error:.1e} relative to fp64, where {allowed:.1e} is allowed and "
                f"eager has {eager[quantity]:.1e}; it is not timed"
            )


def race(
    steps: Mapping[str, Step],
    work: Work,
    comparison: Comparison,
    *,
    rounds: int,
    seconds: float,
    on_round: Callable[[], None],
) -> None:
    """Time the contestants in turn; what was timed stays in the comparison, also when this is interrupted."""
    results = {result.name: result for result in comparison.results if result.name in steps}
    try:
        for times in interleave(steps, work.device, rounds=rounds, sample_ms=SAMPLE_MS, seconds=seconds):
            for name, sample in times.items():
                results[name].samples_ms.append(sample)
            on_round()
        comparison.complete = True
    finally:
        baseline = results[BASELINE].samples_ms
        for result in results.values():
            if baseline and len(result.samples_ms) == len(baseline):
                result.ratio = speedup(baseline, result.samples_ms)
                result.images_per_second = 1e3 * work.batch / median(result.samples_ms)


def begin(work: Work, command: str = "") -> Comparison:
    return Comparison(str(work), machine.conditions(work.device), [], command)

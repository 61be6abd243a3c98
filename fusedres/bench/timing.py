"""Interleaved timing, its statistics, and the JSON that keeps both; CPU and CUDA alike.

Contestants take turns in every round, in a new order each time: a clock that drifts slows all of them, and a
round gives paired ratios. A speed-up is the median of those with a bootstrap interval, never the quotient of
two separate runs.
"""

from __future__ import annotations

import gc
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from statistics import median

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Ratio:
    """How many times faster than the baseline: the median over paired rounds and its 95 % interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def elapsed_ms(call: Call, repeats: int, device: torch.device) -> float:
    """Milliseconds a call, over `repeats` calls in a row; on CUDA by events: launch gaps count as in use."""
    if device.type == "cuda":
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(repeats):
            call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / repeats
    began = time.perf_counter_ns()
    for _ in range(repeats):
        call()
    return (time.perf_counter_ns() - began) / 1e6 / repeats


def repeats_for(call: Call, sample_ms: float, device: torch.device) -> int:
    """How many calls make a sample of about `sample_ms`. The call must be warm already."""
    once = elapsed_ms(call, 1, device)
    refined = elapsed_ms(call, max(1, min(10, int(sample_ms / max(once, 1e-4)))), device)
    return max(1, min(1000, round(sample_ms / max(refined, 1e-4))))


def interleave(
    calls: Mapping[str, Call],
    device: torch.device,
    *,
    rounds: int,
    sample_ms: float,
    seconds: float,
    seed: int = 0,
) -> Iterator[dict[str, float]]:
    """Yields one {name: milliseconds per call} a round, until `rounds` are done or `seconds` have passed."""
    stop_at = time.monotonic() + seconds
    repeats = {name: repeats_for(call, sample_ms, device) for name, call in calls.items()}
    order, shuffle = list(calls), random.Random(seed).shuffle
    gc.collect()
    gc.disable()  # a collection would fall into one contestant's sample
    try:
        for _ in range(rounds):
            shuffle(order)
            yield {name: elapsed_ms(calls[name], repeats[name], device) for name in order}
            if time.monotonic() > stop_at:
                return
    finally:
        gc.enable()


def samples_ms(call: Call, device: torch.device, *, count: int, sample_ms: float) -> list[float]:
    """`count` samples of one call's milliseconds; the first, unrecorded, call warms it up."""
    call()
    repeats = repeats_for(call, sample_ms, device)
    return [elapsed_ms(call, repeats, device) for _ in range(count)]


def speedup(baseline: Sequence[float], contestant: Sequence[float], *, resamples: int = 10_000, seed: int = 0) -> Ratio:
    """Median of baseline / contestant over paired rounds, with the percentile bootstrap's 95 % interval."""
    ratios = torch.tensor(baseline, dtype=torch.float64) / torch.tensor(contestant, dtype=torch.float64)
    picks = torch.randint(len(ratios), (resamples, len(ratios)), generator=torch.Generator().manual_seed(seed))
    medians = ratios[picks].quantile(0.5, dim=1)
    low, high = medians.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Ratio(median(ratios.tolist()), low, high)


def graphed(call: Call, *, warmups: int = 3) -> Call:
    """`call` as one CUDA graph; every replay returns the captured tensors with new contents."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warmups):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> object:
        graph.replay()
        return result

    return replay


class Report:
    """A JSON file that is replaced whole at every save, so that a killed run leaves what it last saved."""

    def __init__(self, path: Path, **header: object) -> None:
        self.path = path
        self.data: dict[str, object] = header
        self.save()

    def save(self) -> None:
        partial = self.path.with_name(f"{self.path.name}.partial")
        partial.write_text(json.dumps(plain(self.data), indent=1, allow_nan=False) + "\n")
        os.replace(partial, self.path)


def plain(value: object) -> object:
    """`value` in JSON's own types. A number that isn't finite becomes its name: JSON has no NaN."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if isinstance(value, (str, int, bool, type(None))) else str(value)

"""Stage `ops`: a block's end, forward and the whole step, as shares of the copy bandwidth measured beside them.

The CUDA lines of this file have not been run yet: it was written where there is no GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from _gpu_kernels import Step, serving
from _gpu_machine import copy_bandwidth
from _gpu_stage import Run, release
from torch import Tensor

from fusedres.bench.timing import Call, Report, graphed, interleave, speedup
from fusedres.ops import Norm, bn_act

# (N, C, H, W), and the shares of the copy bandwidth to reach: forward, backward.
SHAPES = {
    (256, 256, 56, 56): (0.89, 0.89),
    (256, 64, 112, 112): (0.89, 0.89),
    (256, 512, 28, 28): (0.90, 0.90),
    (256, 64, 56, 56): (0.95, 0.90),
    (256, 1024, 14, 14): (0.95, 0.90),
    (64, 256, 56, 56): (0.95, 0.90),
    (256, 2048, 7, 7): (1.00, 0.90),
    (64, 512, 28, 28): (1.00, 0.90),
    (64, 512, 7, 7): (0.0, 0.0),  # launches are most of it: 7 microseconds each are wanted
}
FORWARD_TENSORS = 4 + 1 / 16  # x twice, the residual, y; a bit an element
BACKWARD_TENSORS = 6 + 2 / 16  # dy and x twice, dx, dr; the bits twice
COPY_BYTES = 400 * 10**6
SHORTEST_S = 25.0


def eager(x: Tensor, weight: Tensor, bias: Tensor, r: Tensor) -> Tensor:
    return F.relu(F.batch_norm(x, None, None, weight, bias, training=True).add_(r), inplace=True)


def fused(x: Tensor, weight: Tensor, bias: Tensor, r: Tensor) -> Tensor:
    return bn_act(x, Norm(weight, bias, training=True), residual=r)


def ops(run: Run, report: Report) -> list[str]:
    records: dict[str, Any] = {}
    copy = copy_bandwidth(run, run.pick(COPY_BYTES, 10**6), in_cache=False)
    report.data |= {"serves": serving(run), "copy": copy, "shapes": records}
    bandwidth = float(copy["terabytes_per_s"]) * 1e12  # pyright: ignore[reportArgumentType]
    for shape in run.pick(tuple(SHAPES), ((2, 8, 4, 4),)):
        if run.left() < run.pick(SHORTEST_S, 1.0):
            break
        records["x".join(map(str, shape))] = measure(run, shape, bandwidth)
        report.save()
        torch.compiler.reset()
        release(run)
    return list(problems(records)) if run.cuda else []


def summary(data: dict[str, Any]) -> Iterator[str]:
    yield f"bn_act is served by {data.get('serves')}; copy {data.get('copy', {}).get('terabytes_per_s', 0):.2f} TB/s"
    for shape, record in data.get("shapes", {}).items():
        yield (
            f"{shape:16} forward {record['forward_share']:6.1%} {record['forward_ms']['fused'] * 1e3:7.1f} us, "
            f"backward {record['backward_share']:6.1%} {record['backward_ms']['fused'] * 1e3:7.1f} us; "
            + ", ".join(f"step {ratio['median']:.2f}x {name}" for name, ratio in record["faster_than"].items())
        )


def problems(records: dict[str, Any]) -> Iterator[str]:
    for shape, record in records.items():
        wanted = record["wanted_shares"]
        for name, share, least in zip(
            ("forward", "backward"), (record["forward_share"], record["backward_share"]), wanted, strict=True
        ):
            if share < least:
                yield f"{shape}: {name} at {share:.1%} of copy bandwidth, {least:.0%} wanted"
        for name, ratio in record["faster_than"].items():
            if ratio["low"] <= 1:
                interval = f"[{ratio['low']:.3f}, {ratio['high']:.3f}]"
                yield f"{shape}: not faster than {name}: {ratio['median']:.3f} {interval}"


def measure(run: Run, shape: tuple[int, ...], bandwidth: float) -> dict[str, Any]:
    """Forward alone and the whole step of every contestant, taking turns; the backward is their difference."""
    itemsize = torch.bfloat16.itemsize
    cache = torch.cuda.get_device_properties(run.device).L2_cache_size if run.cuda else 0
    steps = [Step(run, shape, seed=seed) for seed in range(max(2, math.ceil(4 * cache / (3 * math.prod(shape) * 2))))]
    contestants: dict[str, Callable[..., Tensor]] = {"eager": eager, "fused": fused}
    if run.cuda:
        contestants["compile"] = torch.compile(eager, fullgraph=True, dynamic=False)
    forwards = {name: all_of(run, [forward_of(f, step) for step in steps]) for name, f in contestants.items()}
    wholes = {name: all_of(run, [step_of(f, step) for step in steps]) for name, f in contestants.items()}
    forward, whole = samples_of(run, forwards, len(steps)), samples_of(run, wholes, len(steps))
    forward_ms = {name: median(samples) for name, samples in forward.items()}
    backward_ms = {name: median(samples) - forward_ms[name] for name, samples in whole.items()}
    size = math.prod(shape) * itemsize
    wanted = SHAPES.get(shape, (0.0, 0.0))
    ratios = {name: speedup(whole[name], whole["fused"]) for name in contestants if name != "fused"}
    return {
        "buffers": len(steps),
        "forward_ms": forward_ms,
        "backward_ms": backward_ms,
        "forward_share": FORWARD_TENSORS * size / (forward_ms["fused"] * 1e-3) / bandwidth,
        "backward_share": BACKWARD_TENSORS * size / (backward_ms["fused"] * 1e-3) / bandwidth,
        "wanted_shares": wanted,
        "faster_than": {name: {"median": r.median, "low": r.low, "high": r.high} for name, r in ratios.items()},
        "samples_ms": {"forward": forward, "step": whole},
    }


def forward_of(f: Callable[..., Tensor], step: Step) -> Call:
    """The forward that a training step has: it saves what its backward needs."""
    return lambda: f(step.x, step.weight, step.bias, step.r)


def step_of(f: Callable[..., Tensor], step: Step) -> Call:
    def call() -> tuple[Tensor, ...]:
        y = f(step.x, step.weight, step.bias, step.r)
        return torch.autograd.grad(y, (step.x, step.r, step.weight, step.bias), step.dy)

    return call


def all_of(run: Run, calls: Sequence[Call]) -> Call:
    """One call over every buffer, so that none is met again while it is cached; on CUDA as one graph."""

    def one_by_one() -> None:
        for call in calls:
            call()

    return graphed(one_by_one) if run.cuda else one_by_one


def samples_of(run: Run, calls: dict[str, Call], buffers: int) -> dict[str, list[float]]:
    """Milliseconds for one buffer, sample by sample."""
    for call in calls.values():
        call()
    rounds = list(
        interleave(calls, run.device, rounds=run.pick(31, 3), sample_ms=run.pick(20, 1), seconds=run.pick(15, 1))
    )
    return {name: [sample[name] / buffers for sample in rounds] for name in calls}

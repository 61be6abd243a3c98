"""Stage `ops`: a block's end and a stem, forward and the whole step, as shares of the copy bandwidth measured beside.

The CUDA lines of this file have not been run yet: it was written where there is no GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from _gpu_kernels import STEM_SHAPE, STEM_WINDOW, Stem, Step, serving
from _gpu_machine import copy_bandwidth
from _gpu_stage import Run, compiled, release
from torch import Tensor

from fusedres.bench.timing import Call, Report, graphed, interleave, speedup
from fusedres.ops import Norm, bn_act, bn_act_pool

# (N, C, H, W), and the shares of the copy bandwidth to reach: forward, backward.
SHAPES: dict[tuple[int, ...], tuple[float, float]] = {
    (256, 256, 56, 56): (0.89, 0.89),
    (256, 64, 112, 112): (0.89, 0.89),
    (256, 512, 28, 28): (0.90, 0.90),
    (256, 64, 56, 56): (0.95, 0.90),
    (256, 1024, 14, 14): (0.95, 0.90),
    (64, 256, 56, 56): (0.95, 0.90),
    (256, 2048, 7, 7): (1.00, 0.90),
    (64, 512, 28, 28): (1.00, 0.90),
    (64, 512, 7, 7): (0.0, 0.0),  # launches are most of it
}
LONGEST_US: dict[tuple[int, ...], float] = {(64, 512, 7, 7): 7.0}  # forward and backward each
COPY_BYTES = 400 * 10**6
SHORTEST_S = 25.0


@dataclass(frozen=True)
class Op:
    """What is timed: the formula as eager runs it and as one op, and what the op has to move.

    Args:
        forward_tensors, backward_tensors: in bf16 tensors of x's size.
        tensors: of those, how many one step holds.
    """

    step: type[Step] | type[Stem]
    eager: Callable[[Any], Tensor]
    fused: Callable[[Any], Tensor]
    forward_tensors: float
    backward_tensors: float
    tensors: int


def eager_block_end(step: Step) -> Tensor:
    y = F.batch_norm(step.x, None, None, step.weight, step.bias, training=True)
    return F.relu(y.add_(step.r), inplace=True)


def fused_block_end(step: Step) -> Tensor:
    return bn_act(step.x, Norm(step.weight, step.bias, training=True), residual=step.r)


def eager_stem(step: Stem) -> Tensor:
    y = F.relu(F.batch_norm(step.x, None, None, step.weight, step.bias, training=True), inplace=True)
    return F.max_pool2d(y, *STEM_WINDOW)


def fused_stem(step: Stem) -> Tensor:
    return bn_act_pool(step.x, Norm(step.weight, step.bias, training=True), **STEM_WINDOW._asdict())


# Forward: x twice, the residual, y, a bit an element. Backward: dy and x twice, dx, dr, the bits twice.
BLOCK_END = Op(Step, eager_block_end, fused_block_end, 4 + 1 / 16, 6 + 2 / 16, 3)
# Forward: x twice; of a quarter of the pixels y, and a byte each. Backward: x twice, dx, and those twice with dy.
STEM = Op(Stem, eager_stem, fused_stem, 2 + 1 / 4 + 1 / 8, 3 + 2 / 4 + 2 / 8, 1)


def ops(run: Run, report: Report) -> list[str]:
    records: dict[str, Any] = {}
    copy = copy_bandwidth(run, run.pick(COPY_BYTES, 10**6), in_cache=False)
    report.data |= {"serves": serving(run), "copy": copy, "shapes": records}
    bandwidth = float(copy["terabytes_per_s"]) * 1e12  # pyright: ignore[reportArgumentType]
    work = [(BLOCK_END, shape) for shape in run.pick(tuple(SHAPES), ((2, 8, 4, 4),))]
    for op, shape in [*work, (STEM, run.pick(STEM_SHAPE, (2, 8, 6, 6)))]:
        if run.left() < run.pick(SHORTEST_S, 1.0):
            break
        name = "x".join(map(str, shape))
        records[name if op is BLOCK_END else f"stem {name}"] = measure(run, op, shape, bandwidth)
        report.save()
        torch.compiler.reset()
        release(run)
    return list(problems(records)) if run.cuda else []


def summary(data: dict[str, Any]) -> Iterator[str]:
    yield f"bn_act is served by {data.get('serves')}; copy {data.get('copy', {}).get('terabytes_per_s', 0):.2f} TB/s"
    for shape, record in data.get("shapes", {}).items():
        yield (
            f"{shape:20} forward {record['forward_share']:6.1%} {record['forward_ms']['fused'] * 1e3:7.1f} us, "
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
            took = record[f"{name}_ms"]["fused"] * 1e3
            if record["longest_us"] is not None and took > record["longest_us"]:
                yield f"{shape}: {name} takes {took:.1f} us, {record['longest_us']:g} wanted"
        for name, ratio in record["faster_than"].items():
            if ratio["low"] <= 1:
                interval = f"[{ratio['low']:.3f}, {ratio['high']:.3f}]"
                yield f"{shape}: not faster than {name}: {ratio['median']:.3f} {interval}"


def measure(run: Run, op: Op, shape: tuple[int, ...], bandwidth: float) -> dict[str, Any]:
    """Forward alone and the whole step of every contestant, taking turns; the backward is their difference."""
    size = math.prod(shape) * torch.bfloat16.itemsize
    cache = torch.cuda.get_device_properties(run.device).L2_cache_size if run.cuda else 0
    steps = [op.step(run, shape, seed=seed) for seed in range(max(2, math.ceil(4 * cache / (op.tensors * size))))]
    contestants: dict[str, Callable[[Any], Tensor]] = {"eager": op.eager, "fused": op.fused}
    contestants["compile"] = compiled(op.eager, run)
    forwards = {name: all_of(run, [forward_of(f, step) for step in steps]) for name, f in contestants.items()}
    wholes = {name: all_of(run, [step_of(f, step) for step in steps]) for name, f in contestants.items()}
    forward, whole = samples_of(run, forwards, len(steps)), samples_of(run, wholes, len(steps))
    forward_ms = {name: median(samples) for name, samples in forward.items()}
    backward_ms = {name: median(samples) - forward_ms[name] for name, samples in whole.items()}
    wanted = SHAPES.get(shape, (0.0, 0.0)) if op is BLOCK_END else (0.0, 0.0)
    ratios = {name: speedup(whole[name], whole["fused"]) for name in contestants if name != "fused"}
    return {
        "buffers": len(steps),
        "forward_ms": forward_ms,
        "backward_ms": backward_ms,
        "forward_share": op.forward_tensors * size / (forward_ms["fused"] * 1e-3) / bandwidth,
        "backward_share": op.backward_tensors * size / (backward_ms["fused"] * 1e-3) / bandwidth,
        "wanted_shares": wanted,
        "longest_us": LONGEST_US.get(shape) if op is BLOCK_END else None,
        "faster_than": {name: {"median": r.median, "low": r.low, "high": r.high} for name, r in ratios.items()},
        "samples_ms": {"forward": forward, "step": whole},
    }


def forward_of(f: Callable[[Any], Tensor], step: Step | Stem) -> Call:
    """The forward that a training step has: it saves what its backward needs."""
    return lambda: f(step)


def step_of(f: Callable[[Any], Tensor], step: Step | Stem) -> Call:
    return lambda: torch.autograd.grad(f(step), step.leaves, step.dy)


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

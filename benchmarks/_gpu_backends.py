"""Stage `backends`: bn_act with a residual, every backend's against eager and torch.compile, in one process."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from _gpu_machine import copy_bandwidth
from _gpu_ops import BLOCK_END
from _gpu_stage import Run, compiled, one_line, release
from torch import Tensor

import fusedres
from fusedres import dispatch
from fusedres.backends import Statistics
from fusedres.bench.timing import Call, Report, graphed, interleave, speedup
from fusedres.epilogue import RELU
from fusedres.ops import Norm, bn_act
from fusedres.ops import kernels as registered

# bf16, channels_last: late stages and small batches, where launches count; then where memory does.
SHAPES = (
    (1, 512, 7, 7),
    (64, 512, 7, 7),
    (32, 256, 14, 14),
    (64, 256, 14, 14),
    (256, 512, 7, 7),
    (64, 128, 28, 28),
    (256, 128, 28, 28),
    (64, 256, 56, 56),
    (256, 256, 56, 56),
)
TINY_SHAPES = ((2, 16, 5, 5),)
ROUNDS, SAMPLE_MS = 24, 3.0
# What is wanted of the CUDA kernels, forward and backward each.
LONGEST_US: dict[tuple[int, ...], float] = {(64, 512, 7, 7): 5.0, (32, 256, 14, 14): 5.0}
SMALL_BYTES, OF_TRITON = 20e6, 0.6  # below that size at most this share of what the Triton kernels take
COPY_SHARES: dict[tuple[int, ...], float] = {(256, 256, 56, 56): 0.92}
BASELINE = "eager"
Step = Callable[[Tensor, Tensor, Norm], Tensor]


def fused(x: Tensor, residual: Tensor, norm: Norm) -> Tensor:
    return bn_act(x, norm, residual=residual)


def eager(x: Tensor, residual: Tensor, norm: Norm) -> Tensor:
    weight, bias, mean, var, training, momentum, eps = norm
    y = F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
    return F.relu(y.add_(residual), inplace=True)


def cudnn(x: Tensor, residual: Tensor, norm: Norm) -> Tensor:
    """eager, its norm cuDNN's own: who can't run on these operands is left out."""
    weight, bias, mean, var, training, momentum, eps = norm
    assert weight is not None
    y, *_ = torch.cudnn_batch_norm(x, weight, bias, mean, var, training, momentum, eps)
    return F.relu(y.add_(residual), inplace=True)


def backends(run: Run, report: Report) -> list[str]:
    copy = copy_bandwidth(run, run.pick(400 * 10**6, 10**6), in_cache=False)
    rows: list[dict[str, Any]] = []
    report.data |= {"copy": copy, "shapes": rows}
    for shape in run.pick(SHAPES, TINY_SHAPES):
        for direction in ("forward", "forward and backward"):
            row: dict[str, Any] = {"shape": shape, "direction": direction, "left out": {}, "ms": {}}
            rows.append(row)
            calls = contestants(run, shape, direction, row["left out"])
            for sample in interleave(calls, run.device, rounds=ROUNDS, sample_ms=SAMPLE_MS, seconds=run.left() / 30):
                for name, milliseconds in sample.items():
                    row["ms"].setdefault(name, []).append(milliseconds)
            times = row["ms"]
            row["speedup"] = {name: speedup(times[BASELINE], times[name]) for name in times if name != BASELINE}
            report.save()
            del calls
            torch.compiler.reset()
            release(run)
    bandwidth = float(copy["terabytes_per_s"]) * 1e12  # pyright: ignore[reportArgumentType]
    return list(problems(rows, bandwidth)) if run.cuda else []


def problems(rows: list[dict[str, Any]], bandwidth: float) -> Iterator[str]:
    """Where the CUDA kernels, in graphs, miss what is wanted of them."""
    for forward, step in zip(rows[::2], rows[1::2], strict=True):
        shape = tuple(forward["shape"])
        size = math.prod(shape) * torch.bfloat16.itemsize
        ours, triton = (passes_ms(forward, step, name) for name in ("cuda, graph", "triton, graph"))
        if not ours:
            yield f"{shape}: the CUDA kernels did not run: {forward['left out'].get('cuda')}"
        for name, ms in ours.items():
            tensors = BLOCK_END.forward_tensors if name == "forward" else BLOCK_END.backward_tensors
            share = tensors * size / (ms * 1e-3) / bandwidth
            if 1e3 * ms > LONGEST_US.get(shape, math.inf):
                yield f"{shape}: {name} takes {1e3 * ms:.1f} us, {LONGEST_US[shape]:g} wanted"
            if size < SMALL_BYTES and triton and ms > OF_TRITON * triton[name]:
                yield f"{shape}: {name} takes {ms / triton[name]:.0%} of Triton's time, {OF_TRITON:.0%} wanted"
            if share < COPY_SHARES.get(shape, 0.0):
                yield f"{shape}: {name} at {share:.1%} of copy bandwidth, {COPY_SHARES[shape]:.0%} wanted"


def passes_ms(forward: dict[str, Any], step: dict[str, Any], name: str) -> dict[str, float]:
    """A contestant's forward, and its backward as the difference; nothing where it did not run."""
    if name not in forward["ms"] or name not in step["ms"]:
        return {}
    alone, whole = (median(row["ms"][name]) for row in (forward, step))
    return {"forward": alone, "backward": whole - alone}


def contestants(run: Run, shape: tuple[int, ...], direction: str, left_out: dict[str, str]) -> dict[str, Call]:
    """Warm calls by name, with and without a CUDA graph; who can't run is in `left_out` with the reason."""
    steps: dict[str, Step] = {BASELINE: eager, "compile": compiled(eager, run), "cudnn": cudnn}
    steps |= {backend.name: on(backend.name) for backend in dispatch.ORDER if backend.keys}
    calls: dict[str, Call] = {}
    for name, step in steps.items():
        call = prepared(run, shape, direction, step)
        try:
            if name not in (BASELINE, "compile", "cudnn"):
                with fusedres.use_backend(name):  # which tells its objections
                    prepared(run, shape, direction, fused)()
            for _ in range(3):
                call()
            calls[name] = call
            if run.cuda:
                calls[f"{name}, graph"] = graphed(call)
        except Exception as error:
            left_out[name] = one_line(error)
    return calls


def on(name: str) -> Step:
    """A backend's operator itself: `use_backend` would take its time at every call."""
    operators = registered.of(dispatch.backend(name), "bn_act")

    def step(x: Tensor, residual: Tensor, norm: Norm) -> Tensor:
        weight, bias, mean, var, _, momentum, eps = norm
        sources = Statistics.BATCH.value, Statistics.ABSENT.value
        shortcut = (residual, None, None, None, None, None)
        return operators(x, weight, bias, mean, var, *shortcut, *sources, momentum, momentum, eps, eps, RELU.code)

    return step


def prepared(run: Run, shape: tuple[int, ...], direction: str, step: Step) -> Call:
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).to(run.device)

    x, residual, dy = (normal(*shape).bfloat16().contiguous(memory_format=torch.channels_last) for _ in range(3))
    channels = shape[1]
    backward = direction != "forward"
    weight, bias = normal(channels).requires_grad_(backward), normal(channels).requires_grad_(backward)
    norm = Norm(weight, bias, normal(channels), normal(channels).abs(), training=True)
    if not backward:
        return lambda: step(x, residual, norm)
    x.requires_grad_()
    residual.requires_grad_()

    def call() -> object:
        return torch.autograd.grad(step(x, residual, norm), (x, residual, weight, bias), dy)

    return call


def summary(data: dict[str, Any]) -> Iterator[str]:
    for row in data.get("shapes", []):
        times = {name: sorted(values)[len(values) // 2] for name, values in row["ms"].items()}
        shown = ", ".join(f"{name} {1e3 * ms:.1f} us" for name, ms in times.items())
        yield f"{'x'.join(map(str, row['shape']))} {row['direction']}: {shown}"
        yield from (f"  without {name}: {why}" for name, why in row["left out"].items())

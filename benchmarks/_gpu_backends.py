"""Stage `backends`: bn_act with a residual, every backend's against eager and torch.compile, in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
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
BASELINE = "eager"
Step = Callable[[Tensor, Tensor, Norm], Tensor]


def fused(x: Tensor, residual: Tensor, norm: Norm) -> Tensor:
    return bn_act(x, norm, residual=residual)


def eager(x: Tensor, residual: Tensor, norm: Norm) -> Tensor:
    weight, bias, mean, var, training, momentum, eps = norm
    y = F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
    return F.relu(y.add_(residual), inplace=True)


def backends(run: Run, report: Report) -> list[str]:
    found: list[str] = []
    report.data["shapes"] = []
    for shape in run.pick(SHAPES, TINY_SHAPES):
        for direction in ("forward", "forward and backward"):
            row: dict[str, Any] = {"shape": shape, "direction": direction, "left out": {}, "ms": {}}
            report.data["shapes"].append(row)
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
    return found


def contestants(run: Run, shape: tuple[int, ...], direction: str, left_out: dict[str, str]) -> dict[str, Call]:
    """Warm calls by name, with and without a CUDA graph; who can't run is in `left_out` with the reason."""
    steps: dict[str, Step] = {BASELINE: eager, "compile": compiled(eager, run)}
    steps |= {backend.name: on(backend.name) for backend in dispatch.ORDER if backend.keys}
    calls: dict[str, Call] = {}
    for name, step in steps.items():
        call = prepared(run, shape, direction, step)
        try:
            if name not in (BASELINE, "compile"):
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

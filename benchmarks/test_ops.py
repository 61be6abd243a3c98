"""bn_act and affine_act, both directions, on shapes of ResNet-18 and -50: eager, torch.compile, each backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from statistics import median
from typing import Any

import pytest
import torch
import torch._functorch.config
from conftest import Contestant, Race
from torch import Tensor

import fusedres
from fusedres import dispatch, numerics, testing
from fusedres.bench.ceilings import Ceilings
from fusedres.testing import Case, Operands

torch._functorch.config.donated_buffer = False  # the backward is timed again and again over one graph

SHAPES = ((16, 64, 56, 56), (16, 256, 56, 56), (16, 512, 28, 28), (16, 2048, 7, 7), (1, 512, 7, 7))
QUICK_SHAPES = ((2, 64, 28, 28), (1, 512, 7, 7))
KERNEL_BACKENDS = [backend.name for backend in dispatch.ORDER if "CPU" in backend.keys]
# tensors of M*C elements that have to be read and written, masks left out: (forward, backward)
PASSES = {
    ("bn_act", "plain"): (4, 6),
    ("bn_act", "projection"): (5, 8),
    ("affine_act", "plain"): (3, 3),
}


def in_place_eager(case: Case, given: Operands) -> Tensor:
    """The case as torchvision's blocks run it: the addition and the ReLU overwrite the norm's output."""
    x, norm, residual, residual_norm, _, _ = given
    y = _normalise(case, x, norm)
    if residual is not None:
        y += residual if residual_norm is None else _normalise(case, residual, residual_norm)
    return torch.relu_(y)


def _normalise(case: Case, t: Tensor, norm: fusedres.ops.Norm) -> Tensor:
    mean, var = norm.running_mean, norm.running_var
    if case.op == "bn_act":
        return torch.nn.functional.batch_norm(t, mean, var, norm.weight, norm.bias, True, norm.momentum, norm.eps)
    unit = torch.ones_like(mean) if mean is not None else None  # affine_act's scale is the weight alone
    return torch.nn.functional.batch_norm(t, mean, unit, norm.weight, norm.bias, False, 0.0, 0.0)


def contestants(case: Case, direction: str) -> Mapping[str, Contestant]:
    return {name: Contestant(_timed(run, case, direction), partial(_check, name, case)) for name, run in RUNS.items()}


def _on_backend(name: str, case: Case, given: Operands) -> Tensor:
    with fusedres.use_backend(name):
        return testing.candidate(case, given)


RUNS: dict[str, numerics.Run] = {
    "eager": in_place_eager,
    "torch.compile": torch.compile(in_place_eager),
    **{name: partial(_on_backend, name) for name in KERNEL_BACKENDS},
}


def _timed(run: numerics.Run, case: Case, direction: str) -> Callable[[], object]:
    given = testing.operands(case)
    if direction == "forward":
        return lambda: run(case, given)
    y = run(case, given)
    leaves = list(numerics.leaves(given).values())
    return lambda: torch.autograd.grad(y, leaves, given.dy, retain_graph=True)


@lru_cache(maxsize=2 * len(RUNS))
def _check(name: str, case: Case) -> Mapping[str, object]:
    """Our own results are held to the bar, a peer's to what excludes another function: it rounds as it likes.

    Forward and backward are checked together, so the second race of a case finds the answer here.
    """
    rows = numerics.compare(case, run=RUNS[name], beside=_yardstick(case))
    for row in rows:
        ours = name in KERNEL_BACKENDS
        if row.fails_alone() if ours else row.error > 10 * row.eager_error + 16 * torch.finfo(case.dtype).eps:
            raise AssertionError(f"not timed, its results are wrong: {row}")
    return {f"error {row.quantity}": row.error for row in rows}


@lru_cache(maxsize=1)
def _yardstick(case: Case) -> numerics.Yardstick:
    return numerics.yardstick(case)


@pytest.mark.parametrize("contestant", list(RUNS))
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("form", list(PASSES), ids="-".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_op(
    index: int,
    dtype: torch.dtype,
    form: tuple[str, str],
    layout: str,
    direction: str,
    contestant: str,
    benchmark: Any,
    race: Race,
    quick: bool,
    ceiling: Callable[[torch.dtype], Ceilings],
) -> None:
    shapes = QUICK_SHAPES if quick else SHAPES
    if index >= len(shapes) or (quick and (layout == "contiguous" or (index and form != ("bn_act", "plain")))):
        pytest.skip("not among the quick ones")
    op, residual = form
    mode = "training" if op == "bn_act" else "eval"
    case = Case(op, dtype, layout, shapes[index], "normal", mode, residual, "none", "relu", "all", 0)
    benchmark.group = f"{op} {residual} {'x'.join(map(str, case.shape))} {str(dtype)[6:]} {layout} {direction}"
    samples = race(benchmark, (case, direction), contestant, partial(contestants, case, direction))
    elements = torch.Size(case.shape).numel()
    moved = PASSES[form][direction == "backward"] * elements * dtype.itemsize
    gbps = moved / median(samples) / 1e6
    benchmark.extra_info |= {"GB/s": gbps, "share of copy bandwidth": gbps / ceiling(torch.float32).copy * 1e9}

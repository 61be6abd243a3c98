"""Every op, both directions, on the shapes of ResNet-18 and -50: eager, torch.compile, each backend, a plain loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from itertools import product
from statistics import median
from typing import Any

import loop
import torch
import torch._functorch.config
from conftest import LOOP, Contestant, Race
from torch import Tensor

import fusedres
from fusedres import dispatch, numerics, testing
from fusedres.backends import Window
from fusedres.bench.ceilings import Ceilings
from fusedres.bench.work import peak_bytes
from fusedres.testing import Case, Operands
from fusedres.tuning.kernels import NORMS

torch._functorch.config.donated_buffer = False  # the backward is timed again and again over one graph

BATCHES = (1, 16)
STEM, *BLOCKS = NORMS
QUICK_SHAPES = ((2, 64, 28, 28), (1, 512, 7, 7))
KERNEL_BACKENDS = [backend.name for backend in dispatch.ORDER if "CPU" in backend.keys]
# By op and residual, forward and backward: the tensors as large as x that have to be (read, written), pass by pass,
# masks left out. A pool of stride 2 has an output of a quarter.
PASSES = {
    ("bn_act", "none"): (((1, 0), (1, 1)), ((2, 0), (2, 1))),
    ("bn_act", "plain"): (((1, 0), (2, 1)), ((2, 0), (2, 2))),
    ("bn_act", "projection"): (((2, 0), (2, 1)), ((3, 0), (3, 2))),
    ("affine_act", "plain"): (((2, 1),), ((2, 2),)),
    ("bn_act_pool", "none"): (((1, 0), (1, 0.25)), ((1.25, 0), (1.25, 1))),
}


def cases(quick: bool) -> dict[str, tuple[Case, str]]:
    """Every form on the shapes where a network has it; the quick ones in channels_last, and a second shape for one."""
    found = {}
    for form, dtype, layout in product(PASSES, (torch.float32, torch.bfloat16), ("channels_last", "contiguous")):
        for shape, direction in product(_shapes(form, quick), ("forward", "backward")):
            if quick and layout == "contiguous":
                continue
            op, residual = form
            mode = "eval" if op == "affine_act" else "training"
            window = Window((3, 3), (2, 2), (1, 1)) if op == "bn_act_pool" else None
            case = Case(op, dtype, layout, shape, "normal", mode, residual, "none", "relu", "all", 0, window)
            name = f"{op} {residual} {'x'.join(map(str, shape))} {str(dtype)[6:]} {layout} {direction}"
            found[name] = case, direction
    return found


def _shapes(form: tuple[str, str], quick: bool) -> Sequence[tuple[int, ...]]:
    if quick:
        return QUICK_SHAPES if form == ("bn_act", "plain") else QUICK_SHAPES[:1]
    shapes = {"bn_act_pool": [STEM], "affine_act": BLOCKS, "bn_act": [STEM, *BLOCKS] if form[1] == "none" else BLOCKS}
    return [(batch, *shape) for batch in BATCHES for shape in shapes[form[0]]]


def races(quick: bool) -> dict[str, list[str]]:
    return {name: _names(case) for name, (case, _) in cases(quick).items()}


def _names(case: Case) -> list[str]:
    return [*RUNS, *([] if case.op == "bn_act_pool" else [LOOP])]  # of a pool's tensors some are smaller


def _passes(case: Case, direction: str) -> loop.Passes:
    return PASSES[case.op, case.residual][direction == "backward"]


def in_place_eager(case: Case, given: Operands) -> Tensor:
    """The case as torchvision's networks run it: the addition and the ReLU overwrite the norm's output."""
    x, norm, residual, residual_norm, _, _ = given
    y = _normalise(case, x, norm)
    if residual is not None:
        y += residual if residual_norm is None else _normalise(case, residual, residual_norm)
    y = torch.relu_(y)
    return y if case.window is None else torch.nn.functional.max_pool2d(y, *case.window)


def _normalise(case: Case, t: Tensor, norm: fusedres.ops.Norm) -> Tensor:
    mean, var = norm.running_mean, norm.running_var
    if case.op != "affine_act":
        return torch.nn.functional.batch_norm(t, mean, var, norm.weight, norm.bias, True, norm.momentum, norm.eps)
    unit = torch.ones_like(mean) if mean is not None else None  # affine_act's scale is the weight alone
    return torch.nn.functional.batch_norm(t, mean, unit, norm.weight, norm.bias, False, 0.0, 0.0)


def contestants(case: Case, direction: str) -> Mapping[str, Contestant]:
    return {name: _contestant(name, case, direction) for name in _names(case)}


def _contestant(name: str, case: Case, direction: str) -> Contestant:
    if name == LOOP:
        moves = loop.loop(_passes(case, direction), torch.Size(case.shape).numel(), case.dtype)
        return Contestant(moves, lambda: {"error y": 0.0, "peak_bytes": peak_bytes(moves, torch.device("cpu"))})
    call = _timed(RUNS[name], case, direction)

    def check() -> Mapping[str, object]:
        errors = _check(name, case)
        call()
        return {**errors, "peak_bytes": peak_bytes(call, torch.device("cpu"))}

    return Contestant(call, check)


def compiled(case: Case, given: Operands) -> Tensor:
    return _compiled_for(case)(case, given)


@lru_cache(maxsize=1)
def _compiled_for(case: Case) -> numerics.Run:
    """Compiled anew: after a few shapes torch.compile would make the code dynamic, and after some more give up."""
    torch._dynamo.reset()
    return torch.compile(in_place_eager, dynamic=False)


def _on_backend(name: str, case: Case, given: Operands) -> Tensor:
    with fusedres.use_backend(name):
        return testing.candidate(case, given)


RUNS: dict[str, numerics.Run] = {
    "eager": in_place_eager,
    "torch.compile": compiled,
    **{name: partial(_on_backend, name) for name in KERNEL_BACKENDS},
}


def _timed(run: numerics.Run, case: Case, direction: str) -> Callable[[], object]:
    given = testing.operands(case)
    if direction == "forward":
        return lambda: run(case, given)
    y = run(case, given)
    leaves = list(numerics.leaves(given).values())
    dy = torch.empty_like(y, requires_grad=False).copy_(given.dy)  # in y's layout, as a network's next layer gives it
    return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)


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


def test_op(
    case: str,
    contestant: str,
    benchmark: Any,
    race: Race,
    quick: bool,
    ceiling: Callable[[torch.dtype], Ceilings],
) -> None:
    described, direction = cases(quick)[case]
    benchmark.group = case
    samples = race(benchmark, case, contestant, partial(contestants, described, direction))
    passes = sum(read + written for read, written in _passes(described, direction))
    moved = passes * torch.Size(described.shape).numel() * described.dtype.itemsize
    gbps = moved / median(samples) / 1e6
    benchmark.extra_info |= {"GB/s": gbps, "share of copy bandwidth": gbps / ceiling(torch.float32).copy * 1e9}

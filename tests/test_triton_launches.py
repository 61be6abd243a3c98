"""What the Triton backend does on the host, where there is no GPU: how many kernels a call launches, and that a second
call works out nothing that the first one knew."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="Triton is not installed")

from fusedres.backends import Statistics
from fusedres.backends.triton import affine_act, bn_act, bn_act_pool, configurations, launch
from fusedres.backends.triton.view import View

BATCH, RUNNING, ABSENT = Statistics.BATCH.value, Statistics.RUNNING.value, Statistics.ABSENT.value
SHAPE, WINDOW = (2, 16, 8, 8), ((3, 3), (2, 2), (1, 1))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The kernels that would run, by name."""
    found: list[str] = []
    monkeypatch.setattr(launch, "launch", lambda kernel, *_: found.append(kernel.__name__))
    monkeypatch.setattr(launch, "device_of", lambda device: launch.Device("imaginary", 90, 132))
    launch.forget_plans()
    yield found
    launch.forget_plans()


def tensor(*shape: int) -> Tensor:
    t = torch.empty(shape or SHAPE, dtype=torch.bfloat16, device="meta")
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t.float()


def norm(source: int) -> list[Tensor | None]:
    return [None] * 4 if source == ABSENT else [tensor(SHAPE[1]) for _ in range(4)]


def forward(source: int, source_r: int) -> tuple[Tensor, ...]:
    scalars = source, source_r, 0.1, 0.1, 1e-5, 1e-5, 1
    return bn_act.bn_act_forward(tensor(), *norm(source), tensor(), *norm(source_r), None, *scalars, True)


def backward(source: int, source_r: int, needs: list[bool]) -> tuple[Tensor, ...]:
    _, stats, stats_r, mask = forward(source, source_r)
    saved = tensor(), None, mask, tensor(), *norm(source)[:2], stats, tensor(), *norm(source_r)[:2], stats_r, None
    return bn_act.bn_act_backward(*saved, source, source_r, 1, needs)


def pool_forward(source: int) -> tuple[Tensor, ...]:
    return bn_act_pool.bn_act_pool_forward(tensor(), *norm(source), source, 0.1, 1e-5, *WINDOW, 1, True)


def pool_backward(source: int) -> tuple[Tensor, ...]:
    y, stats, choice = pool_forward(source)
    saved = torch.empty_like(y), choice, tensor(), tensor(SHAPE[1]), stats, source
    return bn_act_pool.bn_act_pool_backward(*saved, *WINDOW, [True] * 3)


def affine_forward() -> tuple[Tensor, ...]:
    return affine_act.affine_act_forward(tensor(), *norm(RUNNING)[:3], tensor(), *[None] * 4, 1, False)


STATISTICS, GRADIENT = ["statistics_parts", "statistics_finish"], ["gradient_sums", "gradient_finish"]
FORWARDS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "affine": (affine_forward, ["apply"]),
    "eval": (lambda: forward(RUNNING, ABSENT), ["apply"]),
    "eval, projection": (lambda: forward(RUNNING, RUNNING), ["apply"]),
    "training": (lambda: forward(BATCH, ABSENT), [*STATISTICS, "apply"]),
    "training, projection": (lambda: forward(BATCH, BATCH), [*STATISTICS, *STATISTICS, "apply"]),
    "training, frozen projection": (lambda: forward(BATCH, RUNNING), [*STATISTICS, "apply"]),
    "stem, eval": (lambda: pool_forward(RUNNING), ["pool_apply"]),
    "stem, training": (lambda: pool_forward(BATCH), [*STATISTICS, "pool_apply"]),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_a_forward_launches_no_kernel_too_many(name: str, launches: list[str]) -> None:
    call, expected = FORWARDS[name]
    call()
    assert launches == expected


X, R, ALL, NORMS = (
    [True] + [False] * 6,
    [False] * 3 + [True] + [False] * 3,
    [True] * 6 + [False],
    [True] * 4 + [False] * 3,
)
BACKWARDS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "block end": (lambda: backward(BATCH, ABSENT, NORMS), [*GRADIENT, "gradient_apply"]),
    "projection": (lambda: backward(BATCH, BATCH, ALL), [*GRADIENT, "gradient_finish", "gradient_apply"]),
    "frozen, of x alone": (lambda: backward(RUNNING, ABSENT, X), ["gradient_apply"]),
    "of the residual alone": (lambda: backward(BATCH, ABSENT, R), ["gradient_apply"]),
    "nothing wanted": (lambda: backward(BATCH, BATCH, [False] * 7), []),
    "stem": (lambda: pool_backward(BATCH), [*GRADIENT, "gradient_apply"]),
}


@pytest.mark.parametrize("name", BACKWARDS)
def test_a_backward_launches_no_kernel_too_many(name: str, launches: list[str]) -> None:
    call, expected = BACKWARDS[name]
    call()
    start = next((i for i, kernel in enumerate(launches) if kernel.startswith("gradient")), len(launches))
    assert launches[start:] == expected


EVERY = {f"{name}, forward": call for name, (call, _) in FORWARDS.items()}
EVERY |= {f"{name}, backward": call for name, (call, _) in BACKWARDS.items()}


class Guard:
    """In place of torch.cuda.device_of."""

    entered = 0

    def __init__(self, t: Tensor) -> None:
        assert t.shape[1] == SHAPE[1]

    def __enter__(self) -> None:
        Guard.entered += 1

    def __exit__(self, *_: object) -> None:
        Guard.entered -= 1


@pytest.mark.parametrize("name", EVERY)
def test_every_launch_is_on_its_tensors_device(name: str, launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_of", Guard)
    entered: list[int] = []
    monkeypatch.setattr(launch, "launch", lambda *_: entered.append(Guard.entered))
    EVERY[name]()
    assert set(entered) == {1} and Guard.entered == 0


class Operators(TorchDispatchMode):
    """The operators that run inside and make tensors, by name, and what they make; looks at dtypes are remembered."""

    def __init__(self, seen: Callable[[str, Tensor], None]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.seen(function.overloadpacket.__name__, result)
        return result


@pytest.fixture(params=[torch.contiguous_format, torch.channels_last], ids=str)
def made(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Operands that are there before the call, in either order."""
    x, per_channel = tensor().contiguous(memory_format=request.param), tensor(SHAPE[1])
    monkeypatch.setitem(globals(), "tensor", lambda *shape: per_channel if shape else x)


@pytest.mark.parametrize("name", EVERY)
def test_nothing_is_copied_in_either_order(name: str, made: None, launches: list[str]) -> None:
    operators: set[str] = set()
    with Operators(lambda operator, _: operators.add(operator)):
        EVERY[name]()
    assert operators <= {"empty", "empty_like", "new_empty", "select"}


@pytest.mark.parametrize("op", [lambda: forward(BATCH, BATCH), lambda: pool_forward(BATCH)], ids=["bn_act", "stem"])
def test_memory_for_the_results_is_there_before_statistics_move(
    op: Callable[[], Any], made: None, launches: list[str]
) -> None:
    """Where it is short, the step is as if it had not begun."""
    launched_before: list[int] = []

    def seen(_: str, result: Tensor) -> None:
        if result.dim() == 4:
            launched_before.append(len(launches))

    with Operators(seen):
        op()
    assert launched_before and not any(launched_before) and launches


def functions_called(call: Callable[[], Any]) -> list[str]:
    """The Python functions of the backend that a call enters."""
    entered: list[str] = []

    def profile(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and "fusedres" in frame.f_code.co_filename and "tests" not in frame.f_code.co_filename:
            entered.append(frame.f_code.co_name)

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return entered


WORKED_OUT_ONCE = {"blocks", "default", "chosen", "row_factor", "_plan", "key", "accumulation_dtype", "_elements_cost"}
CALLS_A_LAUNCH = 24


@pytest.mark.parametrize("name", FORWARDS)
def test_a_second_call_works_nothing_out_again(name: str, launches: list[str]) -> None:
    call, expected = FORWARDS[name]
    first, second = functions_called(call), functions_called(call)
    assert set(first) >= {"blocks", "default", "_plan"} and not WORKED_OUT_ONCE & set(second)
    assert len(second) <= CALLS_A_LAUNCH * len(expected), second


def test_what_is_remembered_depends_on_all_that_it_is_worked_out_from(launches: list[str]) -> None:
    view, x = View(1, 4096, 64, True), tensor()
    plan = launch.Plan.of(configurations.APPLY, view, x)
    assert launch.Plan.of(configurations.APPLY, view, x) is plan
    others = [
        launch.Plan.of(configurations.STATISTICS, view, x),
        launch.Plan.of(configurations.APPLY, view._replace(pixels=4097), x),
        launch.Plan.of(configurations.APPLY, view, x.float()),
    ]
    with launch.forced(configurations.APPLY, configurations.APPLY.configs[0]):
        others.append(launch.Plan.of(configurations.APPLY, view, x))
    assert plan not in others and launch.Plan.of(configurations.APPLY, view, x) is plan

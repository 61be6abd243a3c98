"""Whose kernels serve a norm on a GPU, where there is none: what the table holds, and what it chooses."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import python_backend
import torch

import fusedres
from fusedres import dispatch
from fusedres.backends import Backend, Request, Statistics, cuda, ranking, reference
from fusedres.ops import contract
from fusedres.segment import requests
from fusedres.tuning import backends

DEVICE = "NVIDIA Imaginary 9000"
SMALL, LARGE = (64, 512, 7, 7), (256, 256, 56, 56)


@pytest.fixture(autouse=True)
def imaginary_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Triton and CUDA have no objection but to what is not bf16, and times may choose."""

    def objection(request: Request) -> str | None:
        return None if request.dtype == torch.bfloat16 else "it is not bfloat16"

    order = [Backend("triton", objection, keys=("CUDA",)), Backend("cuda", objection, keys=("CUDA",), ops=cuda.OPS)]
    monkeypatch.setattr(dispatch, "ORDER", [*order, reference.BACKEND])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: DEVICE)
    monkeypatch.setenv("FUSEDRES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(ranking, "_read", {})
    torch.use_deterministic_algorithms(False)
    dispatch.clear()
    yield
    torch.use_deterministic_algorithms(True, warn_only=True)
    dispatch.clear()


def request(shape: tuple[int, ...] = SMALL, op: str = "bn_act", dtype: torch.dtype = torch.bfloat16) -> Request:
    of_size = ranking.size_class("cuda", torch.Size(shape).numel())
    return Request(op, "cuda", dtype, "channels_last", "relu", Statistics.BATCH.value, size_class=of_size)


def forget() -> None:
    """As in a new process."""
    ranking._read.clear()
    dispatch.clear()


def test_a_size_class_is_served_by_the_fastest_that_was_measured() -> None:
    assert [dispatch.choose(request(shape)).name for shape in (SMALL, LARGE)] == ["triton"] * 2, "the rule"
    ranking.keep({
        ranking.entry_of(request(SMALL)): {"triton": 2.0, "cuda": 1.0},
        ranking.entry_of(request(LARGE)): {"triton": 1.0, "cuda": 2.0},
    })  # fmt: skip
    forget()
    assert [dispatch.choose(request(shape)).name for shape in (SMALL, LARGE)] == ["cuda", "triton"]
    others = request((256, 64, 56, 56)), request()._replace(layout="contiguous"), request(op="affine_act")
    pool = request()._replace(op="bn_act_pool", window_positions=9)
    assert {dispatch.choose(other).name for other in (*others, pool)} == {"triton"}


@pytest.mark.parametrize("times", [{"triton": 1.0, "cuda": 0.95}, {"cuda": 1.0}, {"triton": 1.0}])
def test_near_ties_and_what_was_not_measured_leave_it_to_the_rule(times: dict[str, float]) -> None:
    ranking.keep({ranking.entry_of(request()): times})
    assert dispatch.choose(request()).name == "triton"


def faster_cuda() -> None:
    ranking.keep({ranking.entry_of(request()): {"triton": 2.0, "cuda": 1.0}})
    forget()


def test_deterministic_algorithms_the_environment_and_a_forced_backend_leave_it_to_the_rule(monkeypatch) -> None:
    faster_cuda()
    assert dispatch.choose(request()).name == "cuda"
    torch.use_deterministic_algorithms(True)
    assert dispatch.choose(request()).name == "triton"
    torch.use_deterministic_algorithms(False)
    assert dispatch.choose(request()).name == "cuda"
    with fusedres.use_backend("triton"):
        assert dispatch.choose(request()).name == "triton"
    dispatch.clear()
    monkeypatch.setenv("FUSEDRES_TUNE", "0")
    assert dispatch.choose(request()).name == "triton"


def test_the_fastest_with_an_objection_is_passed_over() -> None:
    wide = request(dtype=torch.float32)
    ranking.keep({ranking.entry_of(wide): {"triton": 2.0, "cuda": 1.0}})
    assert dispatch.choose(wide).name == "reference"


def test_explain_tells_the_times_that_chose() -> None:
    faster_cuda()
    with dispatch.recording(torch.nn.Identity()) as choices:
        dispatch.choose(request())
        dispatch.choose(request(LARGE))
    assert [(choice.backend, choice.objections.get("measured")) for choice in choices] == [
        ("cuda", "cuda 1 ms, triton 2 ms"),
        ("triton", None),
    ]


def test_a_backend_that_is_not_in_the_times_comes_in_the_dispatchers_order() -> None:
    faster_cuda()
    with python_backend.registered():
        assert dispatch.choose(request()).name == "python"


STALE: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "its device is .* and not": lambda patch: patch.setattr(torch.cuda, "get_device_name", lambda: "another"),
    "its triton is .* and not": lambda patch: patch.setattr(ranking.metadata, "version", lambda name: "2.0"),
    "its torch is .* and not": lambda patch: patch.setattr(torch, "__version__", "1.0"),
    "its kernels is .* and not": lambda patch: patch.setattr(ranking, "_kernels", lambda: "older"),
}


@pytest.mark.parametrize("reason", STALE)
def test_a_foreign_or_stale_table_is_ignored_with_one_warning(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    here = ranking.table().path
    with monkeypatch.context() as patch:
        STALE[reason](patch)
        faster_cuda()
        ranking.table().path.rename(here)
    with pytest.warns(UserWarning, match=f"times of backends in .* are ignored, because {reason}") as caught:
        assert [dispatch.choose(request(shape)).name for shape in (SMALL, LARGE)] == ["triton"] * 2
    assert len(caught) == 1


def test_a_thousand_damaged_tables_crash_nothing_and_choose_nothing_wrong() -> None:
    faster_cuda()
    path, generator, refused = ranking.table().path, random.Random(0), 0
    text = path.read_bytes()
    for _ in range(1000):
        data = bytearray(text)
        for _ in range(generator.randint(1, 3)):
            at = generator.randrange(len(data))
            data[at : at + generator.randint(0, 3)] = generator.randbytes(generator.randint(0, 3))
        path.write_bytes(data)
        forget()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert dispatch.choose(request()).name == ("triton" if caught else "cuda")
        refused += len(caught)
    assert 900 < refused <= 1000


def test_the_classes_part_where_their_bounds_are() -> None:
    bounds = ranking.BOUNDS
    assert [ranking.size_class("cuda", n) for n in (1, bounds[0], bounds[0] + 1, bounds[-1] + 1)] == [1, 1, 2, 10]
    assert ranking.size_class("cpu", bounds[-1] + 1) == 0


def test_ops_and_segments_tell_their_size_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "BOUNDS", (3 * 8 * 8, 5 * 8 * 8))
    seen = []
    monkeypatch.setattr(contract, "size_class", lambda device, elements: seen.append(elements) or 1)
    monkeypatch.setattr(requests, "size_class", lambda device, elements: seen.append(elements) or 2)
    monkeypatch.setattr(requests, "_known", {})
    x = torch.randn(1, 3, 8, 8)
    assert contract.request("bn_act", x, None, None, contract.activation("relu"), None).size_class == 1
    with python_backend.registered():
        fusedres.BasicBlock(3, 5, 2)(x)
    assert seen == [3 * 8 * 8, 5 * 4 * 4, 5 * 4 * 4]


def test_torch_compile_traces_the_choice_and_compiles_anew_for_another_class() -> None:
    faster_cuda()

    def served(x: torch.Tensor) -> torch.Tensor:
        shape = Request("bn_act", "cuda", torch.bfloat16, "channels_last", "relu", 1, compiling=True)
        found = dispatch.choose(shape._replace(size_class=ranking.size_class("cuda", x.numel() * 1024)))
        return x + (1 if found.name == "cuda" else 2)

    torch._dynamo.reset()
    compiled = torch.compile(served, fullgraph=True, dynamic=True, backend="eager")
    elements = torch.Size(SMALL).numel() // 1024
    assert [compiled(torch.zeros(n))[0].item() for n in (elements, 16 * elements, elements + 1)] == [1, 2, 1]


def test_tuning_keeps_each_classes_times_and_the_dispatcher_knows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, progress = [], []

    def time_ms(calls, device) -> float:
        asked.append(dispatch._forced)
        return {"triton": 2.0, "cuda": 1.0}[str(dispatch._forced)]

    monkeypatch.setattr(backends, "time_ms", time_ms)
    monkeypatch.setattr(backends.BlockEnd, "calls", lambda self: [])
    assert dispatch.choose(request()).name == "triton"
    shapes = [SMALL, (32, 256, 14, 14), LARGE]
    path = backends.rank(shapes, device="meta", progress=lambda done, total: progress.append((done, total)))
    assert path == ranking.table().path and progress == [(n, 4) for n in range(1, 5)]
    assert sorted(asked) == ["cuda"] * 6 + ["triton"] * 6 and dispatch._forced is None
    assert [dispatch.choose(request(shape)).name for shape in (SMALL, LARGE)] == ["cuda"] * 2
    forget()
    assert ranking._known(ranking.entry_of(request())) == {"triton": 4.0, "cuda": 2.0}, "two shapes are of one class"


def test_a_backend_that_serves_only_some_of_a_class_is_not_ranked(monkeypatch: pytest.MonkeyPatch) -> None:
    def time_ms(calls, device) -> float:
        if dispatch._forced == "cuda":
            raise dispatch.Unserved("cuda", "there is no nvcc")
        return 1.0

    monkeypatch.setattr(backends, "time_ms", time_ms)
    monkeypatch.setattr(backends.BlockEnd, "calls", lambda self: [])
    backends.rank([SMALL, SMALL], device="meta")
    assert ranking._known(ranking.entry_of(request())) == {"triton": 2.0}


def test_what_is_timed_is_a_blocks_end_that_moves_no_running_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "cache_bytes", lambda device: 1)
    monkeypatch.setattr(dispatch, "ORDER", [reference.BACKEND])
    place = torch.channels_last, torch.device("cpu")
    seen = []
    choose = dispatch.choose
    monkeypatch.setattr(dispatch, "choose", lambda request: seen.append(request) or choose(request))
    moved = []
    monkeypatch.setattr(torch.autograd.graph, "increment_version", moved.extend)
    for training in (True, False):
        block_end = backends.BlockEnd((2, 8, 4, 4), torch.bfloat16, *place, training)
        results = [call() for call in block_end.calls()]
        assert len(results) == 2 and (len(results[0]) == 4) == training
    assert [(r.op, r.statistics, r.residual_dtype) for r in seen[::2]] == [
        ("bn_act", Statistics.BATCH, torch.bfloat16),
        ("affine_act", Statistics.ABSENT, torch.bfloat16),
    ]
    assert not moved


def test_tuning_inside_a_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="a CUDA graph's capture can't; tune before"):
        backends.rank()

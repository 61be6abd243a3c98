"""The Triton backend's conv_act where there is no GPU: what it objects to, who is chosen, and how a product is cut."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

import fusedres
from fusedres import dispatch
from fusedres.backends import Filter, Geometry, Request, triton
from fusedres.backends.triton import launch, tuned
from fusedres.backends.triton.blocking import HALF, PRODUCTS, SINGLE, Blocks, Problem, default, possible
from fusedres.backends.triton.configurations import ARCHITECTURES, architecture
from fusedres.backends.triton.convolution import CONVOLUTION
from fusedres.epilogue import RELU
from fusedres.ops import contract, conv_act
from fusedres.tuning import kernels, products
from fusedres.tuning.products import Pointwise

FITS = Request(
    "conv_act", "cuda", torch.bfloat16, "channels_last", "relu", 0, torch.bfloat16, torch.bfloat16, "channels_last",
    window_positions=1, geometry=Geometry((2, 2)),
)  # fmt: skip
RESERVE = "it was not measured to be faster here; optimize(model, example) measures it"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A machine on which nothing speaks against the kernels, nor against cuDNN."""
    monkeypatch.setattr(triton, "_machine", [None])
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    dispatch.clear()
    yield monkeypatch
    dispatch.clear()


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("act, rule", [("relu", "cudnn"), ("silu", "reference")])
def test_the_rule_never_names_it(act: str, rule: str) -> None:
    request = FITS._replace(act=act)
    assert dispatch.objection(triton.BACKEND, request) is None
    assert dispatch.serving(request).name == rule
    assert dispatch.objections(request)["triton"] == RESERVE
    with fusedres.use_backend("triton"):
        assert dispatch.serving(request).name == "triton"


@pytest.mark.usefixtures("gpu")
def test_what_was_measured_takes_the_place_of_the_reserve() -> None:
    with dispatch.recording(torch.nn.Identity()) as choices:
        assert dispatch.recorder is not None
        dispatch.recorder.add(FITS, triton.BACKEND, "triton 1 ms, cudnn 2 ms")
        dispatch.recorder.add(FITS, dispatch.serving(FITS), "cudnn 1 ms, triton 2 ms")
    first, second = choices
    assert first.backend == "triton" and "triton" not in first.objections
    assert second.backend == "cudnn" and second.objections["triton"] == RESERVE
    assert second.objections["measured"] == "cudnn 1 ms, triton 2 ms"


OPERANDS = (
    ("torch.compile fuses the reference's operations itself", {"compiling": True}),
    ("its convolutions are 1x1", {"window_positions": 9}),
    ("its convolutions are without padding and of one group", {"geometry": Geometry(padding=(1, 1))}),
    ("its convolutions are without padding and of one group", {"geometry": Geometry(groups=2)}),
    ("its convolutions have no backward; call it under torch.no_grad", {"wants_gradient": True}),
    ("x is a tensor subclass, or empty", {"empty": True}),
    ("x is torch.float64, and its convolutions are in torch.float32, torch.b", {"dtype": torch.float64}),
    ("the weight is torch.float32 and x torch.bfloat16; convert one", {"parameter_dtype": torch.float32}),
    ("the residual is torch.float32 and x torch.bfloat16; convert one", {"residual_dtype": torch.float32}),
    ("x is contiguous in memory, and its convolutions are in channels_last", {"layout": "contiguous"}),
    ("the residual is strided in memory, and its conv", {"residual_layout": "strided"}),
    ("cuDNN may multiply float32 as TF32 here, which the kernel does not; convert x", {"tf32": True}),
    ("it has no convolutions for cpu tensors", {"device": "cpu"}),
)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("message, changes", OPERANDS)
def test_operands_that_do_not_fit_are_objected_to(message: str, changes: dict[str, Any]) -> None:
    assert triton.objection(FITS) is None
    reason = triton.objection(FITS._replace(**changes))
    assert reason is not None and reason.startswith(message)


def test_a_dilated_window_of_one_pixel_is_none_the_wider(gpu: pytest.MonkeyPatch) -> None:
    assert triton.objection(FITS._replace(geometry=Geometry(dilation=(3, 3)))) is None
    gpu.setattr(triton, "_machine", ["Triton is not installed"])
    assert triton.objection(FITS) == "Triton is not installed"


def test_forced_on_a_cpu_it_raises_its_objection() -> None:
    x, weight = torch.ones(1, 2, 3, 3), torch.ones(4, 2, 1, 1)
    with (
        fusedres.use_backend("triton"),
        pytest.raises(RuntimeError, match="'triton' was asked for, but it has no convolutions for cpu tensors"),
    ):
        conv_act(x, weight)


def test_tf32_is_what_the_setting_for_convolutions_says() -> None:
    settings: Any = torch.backends.cudnn.conv  # pyright: ignore[reportAttributeAccessIssue]
    before = settings.fp32_precision
    try:
        settings.fp32_precision = "tf32"
        assert contract.multiplies_tf32(torch.float32, "cuda")
        assert not contract.multiplies_tf32(torch.bfloat16, "cuda")
        assert not contract.multiplies_tf32(torch.float32, "cpu")
        settings.fp32_precision = "ieee"
        assert not contract.multiplies_tf32(torch.float32, "cuda")
    finally:
        settings.fp32_precision = before


def problems() -> list[Problem]:
    """ResNet-50's at batch 1, 32 and 256."""
    return [
        Problem(images * (shape.side // shape.stride) ** 2, shape.outputs, shape.inputs, torch.bfloat16, described)
        for images in (1, 32, 256)
        for shape in products.RESNET50
        for described in (True, False)
    ]


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_defaults_fit_and_keep_the_memory_busy(capability: int) -> None:
    processors = ARCHITECTURES[capability].processors
    for problem in problems():
        blocks = default(HALF, problem, capability, processors)
        room = architecture(capability).shared_kib * 1024
        assert blocks.resident(capability, 2) >= 1 and blocks.shared_bytes(2) + 1024 <= room
        assert blocks.bytes_in_flight(capability, 2) >= architecture(capability).bytes_wanted()
        assert blocks.descriptors <= (problem.described and capability >= 90)
        assert blocks.n < 2 * problem.n
        if problem.tiles(blocks) < processors:
            assert blocks.m * blocks.n == min(c.m * c.n for c in possible(HALF, problem, capability))


def test_large_products_have_large_tiles_and_narrow_ones_narrow() -> None:
    def cut(m: int, n: int, capability: int = 90, described: bool = True) -> str:
        problem = Problem(m, n, 256, torch.bfloat16, described)
        return str(default(HALF, problem, capability, ARCHITECTURES[capability].processors))

    assert cut(256 * 56 * 56, 512) == "128x128x64 by descriptors"
    assert cut(256 * 56 * 56, 512, 80) == cut(256 * 56 * 56, 512, described=False) == "128x128x32"
    assert cut(256 * 56 * 56, 64) == "128x64x64 by descriptors"
    assert cut(49, 512) == "64x32x64 by descriptors" and cut(49, 8, 89) == "64x64x64"
    single = Problem(256 * 56 * 56, 64, 256, torch.float32, True)
    assert str(default(SINGLE, single, 90, 132)) == "128x64x16"


def test_processors_without_room_for_two_have_one() -> None:
    blocks = Blocks(128, 64, 64, 4, 3, 2)
    assert blocks.shared_bytes(2) == 2 * (3 * (128 + 64) * 64 + 128 * 64)
    assert [blocks.resident(capability, 2) for capability in (80, 86, 90)] == [1, 1, 2]
    assert Blocks(128, 128, 64, 8, 4, 1).resident(86, 2) == 0


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[tuple[Any, ...]]]:
    """What would be launched: the grid, the arguments, the constants and the warps."""
    found: list[tuple[Any, ...]] = []
    monkeypatch.setenv("FUSEDRES_CACHE", str(tmp_path))
    monkeypatch.setattr(tuned, "_read", {})
    monkeypatch.setattr(launch, "launch", lambda kernel, *rest: found.append(rest))
    monkeypatch.setattr(launch, "device_of", lambda device: launch.Device("imaginary", 90, 132))
    launch.forget_plans()
    yield found
    launch.forget_plans()


def rows(images: int, channels: int, side: int) -> Tensor:
    t = torch.empty(images, channels, side, side, dtype=torch.bfloat16, device="meta")
    return t.contiguous(memory_format=torch.channels_last)


def run(x: Tensor, outputs: int, stride: int = 1) -> Tensor:
    taps = Filter(torch.empty(outputs, x.shape[1], 1, 1, dtype=x.dtype, device="meta"))
    return CONVOLUTION.run(x, taps, None, Geometry((stride, stride)), RELU, False)


def test_one_launch_of_no_more_programs_than_the_device_holds(launches: list[tuple[Any, ...]]) -> None:
    y = run(rows(256, 256, 56), 64)
    assert y.shape == (256, 64, 56, 56) and y.is_contiguous(memory_format=torch.channels_last)
    run(rows(1, 256, 56), 64)
    run(rows(1, 1024, 14), 256, stride=2)
    grids = [grid for grid, *_ in launches]
    assert grids == [(2 * 132,), (98,), (4,)]
    described, small, strided = (arguments for _, arguments, *_ in launches)
    assert described[0].block_shape == [128, 64] and described[1].block_shape == [64, 64]
    assert small[-3:] == (56 * 56, 64, 256) and strided[6] == (7, 7, 14, 14, 2, 2) and strided[-3:] == (49, 256, 1024)


def test_a_tuned_configuration_takes_the_defaults_place(launches: list[tuple[Any, ...]]) -> None:
    other = HALF.configs[0]
    problem = Problem(56 * 56, 64, 256, torch.bfloat16, True)
    form = CONVOLUTION.forms
    assert form is not None
    (before,) = form((64, 256, 1, 1), Geometry(), (1, 256, 56, 56), torch.bfloat16)
    tuned.save("imaginary", {HALF.entry(problem): other})
    launch.forget_plans()
    (after,) = form((64, 256, 1, 1), Geometry(), (1, 256, 56, 56), torch.bfloat16)
    assert before != after == str(other)
    run(rows(1, 256, 56), 64)
    assert launches[-1][1][0].block_shape == [other.m, other.k]
    tuned._read.clear()
    assert tuned.load("imaginary") == {HALF.entry(problem): other}


def test_the_names_of_declared_configurations_differ() -> None:
    for kind in PRODUCTS:
        assert len({str(blocks) for blocks in kind.configs}) == len(kind.configs)


def test_tuning_keeps_the_fastest_way_to_cut_each(launches: list[tuple[Any, ...]], monkeypatch) -> None:
    seen, timed = [], []

    def time_ms(calls: Any, device: torch.device) -> float:
        for call in calls:
            call()
        _, arguments, constants, _ = launches[-1]
        tiling = constants["TILING"]
        timed.append((arguments[-3:], tiling.descriptors.value))
        return abs(tiling.m.value - 64) + abs(tiling.n.value - 64)

    monkeypatch.setattr(kernels, "time_ms", time_ms)
    monkeypatch.setattr(kernels, "cache_bytes", lambda device: 1)
    shapes = Pointwise(64, 256, 8, joins=True), Pointwise(256, 512, 8, 2)
    path = products.tune_products(
        shapes, images=2, device="meta", progress=lambda done, total: seen.append((done, total))
    )
    assert path == tuned.path_of("imaginary") and seen == [(1, 2), (2, 2)]
    assert {sizes for sizes, _ in timed} == {(128, 256, 64), (32, 512, 256)}
    assert [described for sizes, described in timed if sizes[0] == 32] == [False] * 2
    assert [described for sizes, described in timed if sizes[0] == 128] == [True, False, True, True, False, True]
    found = tuned.load("imaginary")
    assert {entry: str(blocks) for entry, blocks in found.items()} == {
        "conv_act/bfloat16/descriptors/64x256/8": "64x64x64 by descriptors",
        "conv_act/bfloat16/pointers/256x512/6": "64x64x64",
    }

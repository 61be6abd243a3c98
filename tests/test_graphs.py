"""Optimized networks as CUDA graphs: which batch is replayed by which graph, here with one that only pretends."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import pytest
import torch
from optimized import assert_close, make, outputs
from torch import Tensor, nn
from torchvision_models import resnet

import fusedres
from fusedres import inference
from fusedres.inference import graphs
from fusedres.inference.flatten import flatten
from fusedres.inference.graphs import Graphs
from fusedres.inference.steps import Mode
from fusedres.swap import Optimized


class Pretended:
    """Computes anew from its input what a graph would replay."""

    made: ClassVar[list[tuple[int, ...]]] = []

    def __init__(self, run: Callable[[Tensor], Any], x: Tensor) -> None:
        self.run, self.x = run, x
        Pretended.made.append(tuple(x.shape))

    def __call__(self, x: Tensor) -> Tensor:
        self.x[: len(x)].copy_(x)
        return self.run(self.x)[: len(x)].clone()


@pytest.fixture(autouse=True)
def pretended(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The inputs' sizes that graphs were made for, on any device."""
    Pretended.made = []
    monkeypatch.setattr(graphs, "Captured", Pretended)
    monkeypatch.setattr(graphs, "serve", lambda device: True)
    return Pretended.made


def network() -> nn.Module:
    return make(lambda: resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=7))


def graphed(model: nn.Module, largest: int) -> nn.Module:
    fusedres.optimize(model)
    inference.graph(model, largest)
    return model


def images(count: int, size: int = 32) -> Tensor:
    return torch.randn(count, 3, size, size)


def test_a_batch_is_padded_to_its_bucket_and_the_output_cut(pretended: list[tuple[int, ...]]) -> None:
    eager = network()
    model = graphed(copy.deepcopy(eager), 6)
    sizes = [6, 1, 2, 3, 4, 5, 6, 1, 3]
    for size in sizes:
        x = images(size)
        y = outputs(model, x)
        assert y.shape == (size, 7)
        assert_close(y, eager, x)
    assert [shape[0] for shape in pretended] == [6, 1, 2, 4]


def test_larger_and_empty_batches_run_without_a_graph(pretended: list[tuple[int, ...]]) -> None:
    eager = network()
    model = graphed(copy.deepcopy(eager), 2)
    outputs(model, images(1))
    pretended.clear()
    for size in (3, 0, 8):
        x = images(size)
        assert_close(outputs(model, x), eager, x)
    assert not pretended


def test_sizes_dtypes_and_memory_orders_have_graphs_of_their_own(pretended: list[tuple[int, ...]]) -> None:
    seen = []
    graph = Graphs(lambda x: seen.append((tuple(x.shape), x.dtype, x.stride())) or x, 4, True)
    x = images(4, 8)
    inputs = [x, images(3, 8), images(4, 9), x.bfloat16(), x.contiguous(memory_format=torch.channels_last)]
    for given in inputs:
        y = graph(given)
        assert torch.equal(y, given) and y.dtype is given.dtype
    assert len(pretended) == 4
    assert [stride for *_, stride in seen][-1] == inputs[-1].stride()


def test_what_a_graph_was_given_before_shows_in_no_later_output() -> None:
    graph = Graphs(lambda x: x * 1, 4, True)
    first = torch.full((4, 1, 1, 1), torch.nan)
    graph(first)
    y = graph(torch.ones(3, 1, 1, 1))
    assert torch.equal(y, torch.ones(3, 1, 1, 1))
    again = graph(torch.zeros(3, 1, 1, 1))
    assert torch.equal(y, torch.ones(3, 1, 1, 1)) and torch.equal(again, torch.zeros(3, 1, 1, 1))


class MixesImages(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)


@pytest.mark.parametrize(
    "tail, alone",
    [
        ((), True),
        ((nn.Flatten(), nn.Linear(8 * 64, 5), nn.Dropout()), True),
        ((nn.ELU(), nn.AdaptiveAvgPool2d(1)), False),
        ((nn.Flatten(0),), False),
        ((MixesImages(),), False),
        ((nn.BatchNorm2d(8, track_running_stats=False),), False),
        ((nn.ReLU(), nn.BatchNorm2d(8), resnet.BasicBlock(8, 8)), True),
        ((resnet.BasicBlock(8, 8, norm_layer=lambda c: nn.BatchNorm2d(c, track_running_stats=False)),), False),
    ],
)
def test_only_what_computes_image_by_image_is_padded(
    tail: tuple[nn.Module, ...], alone: bool, pretended: list[tuple[int, ...]]
) -> None:
    eager = make(lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), *tail))
    flat = flatten(eager, Mode(torch.device("cpu"), torch.float32, False, None))
    assert graphs.is_by_image(flat) == alone
    model = graphed(copy.deepcopy(eager), 4)
    x = images(3, 8)
    if not isinstance(tail[-1] if tail else None, nn.Flatten) or alone:
        assert_close(outputs(model, x), eager, x)
        assert pretended == [(4 if alone else 3, 3, 8, 8)]


def test_a_hooked_module_may_do_anything() -> None:
    model = make(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2)))
    model[1].register_forward_hook(lambda module, given, y: y.flip(0))
    assert not graphs.is_by_image(flatten(model, Mode(torch.device("cpu"), torch.float32, False, None)))


def test_a_change_makes_new_graphs_and_unoptimize_none(pretended: list[tuple[int, ...]]) -> None:
    eager, x = network(), images(2)
    model = graphed(copy.deepcopy(eager), 2)
    for _ in range(2):
        for module in (model, eager):
            with torch.no_grad():
                module.conv1.weight.mul_(1.5)
        assert_close(outputs(model, x), eager, x)
    assert len(pretended) == 2
    fusedres.unoptimize(model)
    assert_close(outputs(model, x), eager, x)
    fusedres.optimize(model)
    assert_close(outputs(model, x), eager, x)
    assert len(pretended) == 2


def test_an_error_leaves_a_model_its_graphs_and_no_others(pretended: list[tuple[int, ...]]) -> None:
    model, x = graphed(network(), 2), images(2)
    outputs(model, x)
    with pytest.raises(RuntimeError, match="channels"):
        fusedres.optimize(model, torch.randn(4, 5, 32, 32))
    outputs(model, x)
    outputs(model, images(4))
    (program,) = inference._programs[model].values()
    assert program.graphs is not None and [shape[0] for shape in pretended] == [2]


def test_a_copy_has_no_graphs(pretended: list[tuple[int, ...]]) -> None:
    model = graphed(network(), 2)
    twin = copy.deepcopy(model)
    assert isinstance(twin, Optimized)
    outputs(twin, images(2))
    assert not pretended


def test_a_plan_of_inference_mode_serves_outside_of_it(pretended: list[tuple[int, ...]]) -> None:
    model = graphed(network(), 2)
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            model(images(1))
    assert len(pretended) == 1


def test_threads_take_turns() -> None:
    inside = []

    def run(x: Tensor) -> Tensor:
        inside.append(1)
        time.sleep(0.001)
        assert len(inside) == 1
        y = x * 2
        inside.pop()
        return y

    graph = Graphs(run, 4, True)
    inputs = [torch.full((1 + i % 4, 1, 2, 2), float(i)) for i in range(64)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(graph, inputs))
    assert all(torch.equal(y, 2 * x) for x, y in zip(inputs, found, strict=True))


def test_graphs_for_ever_new_sizes_are_not_kept_for_ever(pretended: list[tuple[int, ...]]) -> None:
    graph = Graphs(lambda x: x, 1, True)
    for height in (*range(1, 41), 40, 1):
        graph(torch.ones(1, 1, height, 1))
    assert len(graph._graphs) == 32 and len(pretended) == 41


@pytest.mark.parametrize(
    "example, message",
    [
        (None, "needs an example of the largest batch to be served; pass example="),
        (images(2), "needs the model and the example on a CUDA device, not on cpu; "),
    ],
)
def test_what_cannot_be_captured_is_refused_and_the_model_left_alone(example: Tensor | None, message: str) -> None:
    model = network()
    if example is not None:
        example = example.cpu()
    with pytest.raises(ValueError, match=message):
        fusedres.optimize(model, example, cuda_graph=True)
    assert not any(isinstance(module, Optimized) for module in model.modules())


@pytest.mark.parametrize(
    "shape, part, message",
    [
        ((2, 3, 32, 32), True, "captures a network that has one plan, and this one has none: "),
        ((0, 3, 32, 32), False, r"needs an example of \(N, C, H, W\) with N >= 1, got \(0, 3, 32, 32\)"),
        ((3, 32, 32), False, r"needs an example of \(N, C, H, W\) with N >= 1, got \(3, 32, 32\)"),
    ],
)
def test_what_has_no_plan_as_a_whole_is_refused(shape: tuple[int, ...], part: bool, message: str) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.body(x), x

    class OnDevice(Tensor):
        device = torch.device("cuda")

    model = Branches().eval() if part else network()
    with pytest.raises(ValueError, match=message):
        fusedres.optimize(model, torch.randn(shape).as_subclass(OnDevice), cuda_graph=True)
    assert not any(isinstance(module, Optimized) for module in model.modules())

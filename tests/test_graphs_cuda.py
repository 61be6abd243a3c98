"""What only a GPU shows of captured networks: the graphs themselves, streams, threads, a capture around a call."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from optimized import assert_close, make
from torch import Tensor, nn
from torchvision_models import resnet

import fusedres
from fusedres import inference


@pytest.fixture(autouse=True)
def gpu(device: str) -> None:
    if device == "cpu":
        pytest.skip("CUDA graphs need a GPU: FUSEDRES_TEST_DEVICE=cuda")


def pair(largest: int = 4) -> tuple[nn.Module, nn.Module]:
    eager = make(lambda: resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=7))
    model = copy.deepcopy(eager)
    fusedres.optimize(model, images(largest), cuda_graph=True)
    return model, eager


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 32, 32)


def captured(model: nn.Module) -> int:
    (program,) = inference._programs[model].values()
    assert program.graphs is not None
    return len(program.graphs._graphs)


@torch.no_grad()
def test_every_batch_is_replayed_and_no_output_written_to_again() -> None:
    model, eager = pair()
    inputs = [images(1 + i % 4) for i in range(12)]
    for x, y in [(x, model(x)) for x in inputs]:
        assert_close(y, eager, x)
    assert captured(model) == 3
    assert model(images(9)).isfinite().all()


@torch.no_grad()
def test_a_replay_follows_the_stream_that_calls_it() -> None:
    model, eager = pair()
    torch.cuda.synchronize()
    for _ in range(10):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            x = images(4)
            torch.cuda._sleep(10_000_000)
            x.mul_(2)
            y = model(x)
            assert_close(y, eager, x)


@torch.no_grad()
def test_a_change_is_captured_anew() -> None:
    model, eager = pair()
    for module in (model, eager):
        module.conv1.weight.mul_(2)
    x = images(4)
    assert_close(model(x), eager, x)
    assert captured(model) == 1


def test_eight_threads_get_their_own_results() -> None:
    model, eager = pair()
    inputs = [images(1 + i % 4) for i in range(64)]

    def call(x: Tensor) -> Tensor:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            x.record_stream(torch.cuda.current_stream())
            y = model(x)
            torch.cuda.current_stream().synchronize()
            return y

    torch.cuda.synchronize()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(call, inputs))
    with torch.no_grad():
        for x, y in zip(inputs, found, strict=True):
            assert_close(y, eager, x)


@torch.no_grad()
def test_inside_a_capture_the_plan_itself_is_captured() -> None:
    model, eager = pair()
    x, graph = images(4), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = model(x)
    x.copy_(images(4))
    graph.replay()
    assert_close(y, eager, x)

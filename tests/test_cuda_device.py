"""What only a GPU shows of the CUDA kernels: graphs, streams, repeatability. The shared cases run there as anywhere.

Races and barriers are for compute-sanitizer: python benchmarks/gpu.py --out DIR --stage sanitizers
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import fusedres
from fusedres.ops import Norm, bn_act

# On chip as a whole, read again in part, and in two launches.
SHAPES = [(64, 64, 7, 7), (32, 256, 56, 56), (64, 256, 112, 112)]


@pytest.fixture(autouse=True)
def forced(cuda: None) -> Iterator[None]:
    with fusedres.use_backend("cuda"):
        yield


def step(shape: tuple[int, ...]) -> Callable[[], list[Tensor]]:
    x, r, dy = (torch.randn(shape).bfloat16().contiguous(memory_format=torch.channels_last) for _ in range(3))
    x.requires_grad_()
    r.requires_grad_()
    weight, bias = torch.rand(shape[1], requires_grad=True), torch.rand(shape[1], requires_grad=True)

    def run() -> list[Tensor]:
        y = bn_act(x, Norm(weight, bias, training=True), residual=r)
        return [y.detach(), *torch.autograd.grad(y, [x, r, weight, bias], dy)]

    return run


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_are_the_same_bits_every_time(shape: tuple[int, ...]) -> None:
    run = step(shape)
    first = run()
    assert all(equal(run(), first) for _ in range(20))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_graph_replays_a_step(shape: tuple[int, ...]) -> None:
    run = step(shape)
    expected = run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(3):
        for t in captured:
            t.zero_()
        graph.replay()
        assert equal(captured, expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_streams_run_beside_each_other(shape: tuple[int, ...]) -> None:
    """Cooperative launches of several streams, with the multiprocessors taken by a matrix product."""
    runs = [step(shape) for _ in range(3)]
    expected = [run() for run in runs]
    streams = [torch.cuda.Stream() for _ in runs]
    matrix = torch.randn(2048, 2048)
    torch.cuda.synchronize()
    for _ in range(10):
        for _ in range(4):
            matrix = (matrix @ matrix).clamp(-1, 1)
        found = []
        for run, stream in zip(runs, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(run())
        torch.cuda.synchronize()
        assert all(equal(f, e) for f, e in zip(found, expected, strict=True))

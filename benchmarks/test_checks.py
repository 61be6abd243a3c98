"""What a call pays beside its kernels: a fused block for being sure that nothing in it has changed and nothing forbids
its fusion, an optimized network for that and for calling one operator after the other; and what a step comes to where
calls are all its cost.

The time of the thread, with the computation left out; the least of many rounds is the cost on a machine at rest.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache, partial

import pytest
import torch
from torch import nn

import fusedres
from fusedres import inference, residual
from fusedres.backends import Filter, Geometry, native_convolution
from fusedres.epilogue import RELU
from fusedres.inference.program import Program
from fusedres.testing import import_torchvision

torchvision = import_torchvision()


def projection() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 8, 1, 2, bias=False), nn.BatchNorm2d(8))


def timm_bottleneck() -> nn.Module:
    return pytest.importorskip("timm.models.resnet").Bottleneck(8, 2, 2, projection())


def transformers_bottleneck() -> nn.Module:
    return pytest.importorskip("transformers.models.resnet.modeling_resnet").ResNetBottleNeckLayer(8, 8, 2)


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "fusedres": partial(fusedres.Bottleneck, 8, 2, 2),
    "torchvision": lambda: torchvision.models.resnet.Bottleneck(8, 2, 2, projection()),
    "timm": timm_bottleneck,
    "transformers": transformers_bottleneck,
    "sequential": lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU()),
}


@pytest.mark.benchmark(group="the checks of one call, a bottleneck with a projection", timer=time.thread_time)
@pytest.mark.parametrize("family", FAMILIES)
def test_checks(benchmark, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block = FAMILIES[family]()
    fusedres.fuse(block, strict=True)
    x = torch.randn(1, 8, 256, 256)
    monkeypatch.setattr(residual, "execute", lambda parts, x, memory: parts)
    assert isinstance(block.forward(x), residual.Parts), "the eager path was taken"
    benchmark.pedantic(block.forward, (x,), rounds=100, iterations=500, warmup_rounds=5)


@pytest.mark.benchmark(group="a training step of a bottleneck, a tiny input", timer=time.thread_time)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("by", ["eager", "fusedres"])
def test_small_step(benchmark, by: str, dtype: torch.dtype) -> None:
    block = torchvision.models.resnet.Bottleneck(8, 2, 2, projection())
    if by == "fusedres":
        fusedres.fuse(block, strict=True)
    x = torch.randn(2, 8, 4, 4, requires_grad=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            y = block(x)
        y.sum().backward()

    benchmark.pedantic(step, rounds=200, iterations=20, warmup_rounds=5)


@pytest.mark.benchmark(group="the calls of an optimized network, batch 1", timer=time.thread_time)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("network", ["resnet18", "resnet50"])
def test_plan(benchmark, network: str, dtype: torch.dtype) -> None:
    model = torchvision.models.get_model(network).eval().to(dtype)
    x = torch.randn(1, 3, 224, 224, dtype=dtype).contiguous(memory_format=torch.channels_last)
    fusedres.optimize(model)
    with torch.no_grad():
        model(x)
        (program,) = inference._programs[model].values()
        leave_computation_out(program, dtype)
        benchmark.pedantic(model, (x,), rounds=100, iterations=20, warmup_rounds=5)


def leave_computation_out(program: Program, dtype: torch.dtype) -> None:
    """Let every operator between places of the arena be a convolution of one pixel; the others' results stay."""
    pixel = torch.ones(1, 8, 1, 1, dtype=dtype).contiguous(memory_format=torch.channels_last)
    taps = native_convolution.pack(Filter(torch.ones(8, 8, 1, 1, dtype=dtype)), Geometry(), pixel.shape, False)
    tiny = native_convolution.prepare(pixel, taps, None, Geometry(), RELU, torch.empty_like(pixel))
    plan, bound = program.latest, []
    for step in plan.bound:
        run, calls = lru_cache(lambda x, run=step.calls.run: run(x)), step.calls
        calls = calls._replace(run=run, prepare=calls.prepare and (lambda *operands: tiny))
        bound.append(step._replace(calls=calls))
    plan.bound = tuple(bound)
    program._arenas.clear()

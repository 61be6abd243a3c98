"""What a call of a fused block pays for being sure that nothing in it has changed and nothing forbids its fusion.

The time of the thread, with the computation left out; the least of many rounds is the cost on a machine at rest.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

import fusedres
from fusedres import residual
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

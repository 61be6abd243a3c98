"""Single blocks of ResNet-18 and -50, training steps and inference: eager, channels_last, fusedres, torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import Contestant, Race, add_rates, whole
from torch import nn

from fusedres.bench.ceilings import Ceilings
from fusedres.bench.contestants import ENTRIES
from fusedres.bench.work import Work
from fusedres.testing import import_torchvision

resnet = import_torchvision().models.resnet


@dataclass(frozen=True)
class Shape:
    """A block of torchvision's and what it is given."""

    block: type[nn.Module]
    inplanes: int
    planes: int
    stride: int
    size: int

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        outplanes = self.planes * self.block.expansion
        projection = None
        if self.stride != 1 or self.inplanes != outplanes:
            convolution = nn.Conv2d(self.inplanes, outplanes, 1, self.stride, bias=False)
            projection = nn.Sequential(convolution, nn.BatchNorm2d(outplanes))
        return self.block(self.inplanes, self.planes, self.stride, projection)

    def __str__(self) -> str:
        stride = f" /{self.stride}" if self.stride != 1 else ""
        return f"{self.block.__name__} {self.inplanes} -> {self.planes * self.block.expansion}{stride}"


SHAPES = (
    Shape(resnet.BasicBlock, 64, 64, 1, 56),
    Shape(resnet.BasicBlock, 64, 128, 2, 56),
    Shape(resnet.BasicBlock, 512, 512, 1, 7),
    Shape(resnet.Bottleneck, 256, 64, 1, 56),
    Shape(resnet.Bottleneck, 256, 128, 2, 56),
    Shape(resnet.Bottleneck, 2048, 512, 1, 7),
)
QUICK_SHAPES = (Shape(resnet.BasicBlock, 16, 16, 1, 14), Shape(resnet.Bottleneck, 32, 16, 2, 14))


def contestants(shape: Shape, work: Work, compiled: bool) -> Mapping[str, Contestant]:
    entries = {name: entry for name, entry in ENTRIES.items() if compiled or name != "torch.compile"}
    return whole(shape.build(), work, entries)


@pytest.mark.parametrize("contestant", list(ENTRIES))
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_block(
    index: int,
    dtype: torch.dtype,
    training: bool,
    contestant: str,
    benchmark: Any,
    race: Race,
    quick: bool,
    ceiling: Callable[[torch.dtype], Ceilings],
) -> None:
    shapes = QUICK_SHAPES if quick else SHAPES
    if index >= len(shapes) or (quick and contestant == "torch.compile"):
        pytest.skip("not among the quick ones")
    shape = shapes[index]
    batch, device = 2 if quick else 16, torch.device("cpu")
    work = Work(str(shape), training, batch, shape.size, dtype, device, shape.inplanes)
    benchmark.group = str(work)
    samples = race(benchmark, work, contestant, lambda: contestants(shape, work, not quick))
    add_rates(benchmark, work, samples, ceiling(dtype))

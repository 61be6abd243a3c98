"""Single blocks of ResNet-18 and -50, training steps and inference: eager, channels_last, fusedres, torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from conftest import Race, add_rates, whole
from torch import nn

from fusedres.bench.ceilings import Ceilings
from fusedres.bench.contestants import ENTRIES, FUSED_COMPILED
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
    Shape(resnet.BasicBlock, 8, 8, 1, 4),  # where calls from Python are all there is
    Shape(resnet.Bottleneck, 16, 4, 1, 4),
    Shape(resnet.BasicBlock, 64, 64, 1, 56),
    Shape(resnet.BasicBlock, 64, 128, 2, 56),
    Shape(resnet.BasicBlock, 512, 512, 1, 7),
    Shape(resnet.Bottleneck, 256, 64, 1, 56),
    Shape(resnet.Bottleneck, 256, 128, 2, 56),
    Shape(resnet.Bottleneck, 2048, 512, 1, 7),
)
QUICK_SHAPES = (Shape(resnet.BasicBlock, 16, 16, 1, 14), Shape(resnet.Bottleneck, 32, 16, 2, 14))


def cases(quick: bool) -> dict[str, tuple[Shape, Work]]:
    found = {}
    for shape, dtype, training in product(
        QUICK_SHAPES if quick else SHAPES, (torch.float32, torch.bfloat16), (True, False)
    ):
        batch = 2 if quick else 16
        work = Work(str(shape), training, batch, shape.size, dtype, torch.device("cpu"), shape.inplanes)
        found[str(work)] = shape, work
    return found


def races(quick: bool) -> dict[str, list[str]]:
    names = [name for name in ENTRIES if not quick or name not in ("torch.compile", FUSED_COMPILED)]
    return dict.fromkeys(cases(quick), names)


def test_block(
    case: str,
    contestant: str,
    benchmark: Any,
    race: Race,
    quick: bool,
    ceiling: Callable[[torch.dtype], Ceilings],
) -> None:
    shape, work = cases(quick)[case]
    benchmark.group = case
    entries = {name: ENTRIES[name] for name in races(quick)[case]}
    samples = race(benchmark, case, contestant, lambda: whole(shape.build(), work, entries))
    add_rates(benchmark, work, samples, ceiling(work.dtype))

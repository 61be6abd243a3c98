"""An optimized network and its eager twin, and what of its plan is made and run."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from eager import randomise
from torch import Tensor, nn
from torchvision_models import resnet

import fusedres
from fusedres.inference.program import Program
from fusedres.optimization import Optimization


class Head(nn.Module):
    """A chain with a setting."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.negative = nn.Conv2d(5, 2, 1), False

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x.view(-1, 5, 1, 1))
        return -x if self.negative else x


def network() -> nn.Module:
    """A stem, an identity and a projection block, a head."""
    down = nn.Sequential(nn.Conv2d(4, 6, 1, 2, bias=False), nn.BatchNorm2d(6))
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.LeakyReLU(),
        resnet.BasicBlock(4, 4),
        resnet.BasicBlock(4, 6, 2, down),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
        Head(),
    )
    randomise(model)
    return model.eval()


def pair() -> tuple[nn.Module, nn.Module]:
    """An optimized network that has made its plan, and its eager twin."""
    eager = network()
    model = copy.deepcopy(eager)
    with torch.no_grad():
        for module in (model, eager):
            module[0].weight.mul_(2)
    fusedres.optimize(model, example=images())
    return model, eager


def images(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 3, 8, 8)))


@contextlib.contextmanager
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What plans are made and run inside."""
    seen: list[str] = []
    bind, call = Program.bind, Program.__call__

    def noted(name: str, method: Callable[[Program, Tensor], Tensor]) -> Callable[[Program, Tensor], Tensor]:
        def method_noted(program: Program, x: Tensor) -> Tensor:
            seen.append(name)
            return method(program, x)

        return method_noted

    with monkeypatch.context() as patch:
        patch.setattr(Program, "bind", noted("made", bind))
        patch.setattr(Program, "__call__", noted("ran", call))
        yield seen


FP32_SLACK = 4.0  # Winograd's form of a 3x3 serves


def assert_close(y: Tensor, eager: nn.Module, x: Tensor) -> None:
    """y's largest error against fp64 is at most four times that of eager's result, or a few roundings."""
    with torch.no_grad():
        hold(y, eager(x), exactly(eager, x))


def hold(y: Tensor, theirs: Tensor, exact: Tensor) -> None:
    assert y.shape == theirs.shape and y.dtype == theirs.dtype == torch.float32, "of 16 bits see assert_as_accurate"
    if y.numel():
        bar = max(FP32_SLACK * largest(theirs - exact), 4 * torch.finfo(y.dtype).eps * largest(exact))
        assert largest(y - exact) <= bar


def largest(t: Tensor) -> float:
    return t.abs().max().item()


def exactly(eager: nn.Module, x: Tensor) -> Tensor:
    """What the module gives in fp64. It is converted and back: a copy would have the original's patched forwards."""
    (dtype,) = {parameter.dtype for parameter in eager.parameters()}
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        y = eager.double()(x.double())
    eager.to(dtype)
    return y


Errors = tuple[float, float]


def errors(ours: nn.Module, eager: nn.Module, x: Tensor) -> Errors:
    """Of both against fp64; results of 16 bits are held to eager's over several seeds."""
    found, theirs, exact = outputs(ours, x), outputs(eager, x), exactly(eager, x)
    assert found.shape == theirs.shape and found.dtype == theirs.dtype
    return error(found, exact), error(theirs, exact)


def assert_as_accurate(seen: Sequence[Errors]) -> None:
    """Root mean squares, at most 1.1 times eager's."""
    found, theirs = map(root_mean_square, zip(*seen, strict=True))
    assert found <= 1.1 * theirs


def make(build: Callable[[], nn.Module]) -> nn.Module:
    """In eval mode, with norms that make a difference."""
    model = build().eval()
    randomise(model)
    return model


def optimized(model: nn.Module) -> tuple[nn.Module, Optimization]:
    """An optimized copy, and the report."""
    twin = copy.deepcopy(model)
    return twin, fusedres.optimize(twin)


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    """The first call's, which makes a plan; one that runs it gives the same bits."""
    with torch.no_grad():
        y = model(x)
        torch.testing.assert_close(model(x), y, rtol=0, atol=0, equal_nan=True)
    return y


def batch(size: int = 32, channels: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, channels, size, size, dtype=dtype)


def error(y: Tensor, exact: Tensor) -> float:
    return ((y.double() - exact).norm() / exact.norm()).item()


def root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(sum(value**2 for value in values) / len(values))

"""Training steps of a block, which of their operations ran, and how far their results lie from fp64's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from eager import pair, sample
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

OPERATORS = ("conv", "conv_", "conv_dx", "conv_dx_", "conv_dweight")
# How often a step of `block_and_input`'s own block calls each: where aten has everything, and by the rule.
ATEN = dict.fromkeys(OPERATORS, 0)
RULE = ATEN | {"conv": 3, "conv_": 1, "conv_dweight": 2}


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def relative_error(found: Tensor, exact: Tensor) -> float:
    assert found.shape == exact.shape
    return ((found.double() - exact).square().mean() / exact.square().mean()).sqrt().item()


class Operations(TorchDispatchMode):
    """Counts what runs below autograd, by the operator's name."""

    def __init__(self):
        super().__init__()
        self.count = Counter()
        self.gradients = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func._schema.name.removeprefix("aten::")] += 1
        if func is torch.ops.aten.convolution_backward.default:
            self.gradients.append(tuple(args[-1]))
        return func(*args, **(kwargs or {}))

    @property
    def kernels(self) -> Mapping[str, int]:
        """How often each of the compiled convolutions ran."""
        return {name: self.count[f"fusedres_native::{name}"] for name in OPERATORS}


def block_and_input(
    *build: object, dtype: torch.dtype = torch.float32, layout: torch.memory_format = torch.channels_last
) -> tuple[nn.Module, nn.Module, Tensor]:
    """A fused block in channels_last, its eager twin, and an x for them."""
    fused, eager = pair(*(build or ("BasicBlock", 32, 32)), dtype=dtype)
    for module in (fused, eager):
        module.to(memory_format=torch.channels_last)
    return fused, eager, sample(4, fused.conv1.in_channels, 16, 16, dtype=dtype).to(memory_format=layout)


def step(block: nn.Module, x: Tensor) -> tuple[dict[str, Tensor], Mapping[str, int]]:
    """y and every gradient by name, and how often each compiled convolution ran."""
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    block.zero_grad()
    with Operations() as operations:
        y = block(leaf)
        g = torch.Generator().manual_seed(1)
        y.backward(channels_last(torch.randn(y.shape, generator=g, dtype=torch.float64).to(y.dtype)))
    found = {"y": y.detach(), "dx": leaf.grad} | {name: p.grad.clone() for name, p in block.named_parameters()}
    return found, operations.kernels

"""Runs a fused module and its eager twin side by side and compares everything that a caller can see."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import median

import pytest
import torch
from torch import Tensor, nn

import fusedres
from fusedres import dispatch

FP64_BAR = 1e-12


class EagerBasicBlock(fusedres.BasicBlock):
    forward = fusedres.BasicBlock.eager_forward


class EagerBottleneck(fusedres.Bottleneck):
    forward = fusedres.Bottleneck.eager_forward


FUSED = {"BasicBlock": fusedres.BasicBlock, "Bottleneck": fusedres.Bottleneck}
EAGER = {"BasicBlock": EagerBasicBlock, "Bottleneck": EagerBottleneck}


def randomise(module: nn.Module) -> None:
    """Give every batch norm weights and running statistics that make a difference."""
    for norm in module.modules():
        if hasattr(norm, "running_var") and norm.running_var is not None:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.affine:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)


def pair(name: str, *args: object, dtype: torch.dtype = torch.float64, **kwargs: object) -> tuple[nn.Module, nn.Module]:
    """A fused block and its eager twin with the same parameters."""
    fused = FUSED[name](*args, **kwargs)
    randomise(fused)
    fused = fused.to(dtype)
    eager = copy.deepcopy(fused)
    eager.__class__ = EAGER[name]
    return fused, eager


def identity_pair(**kwargs: object) -> tuple[nn.Module, nn.Module]:
    return pair("BasicBlock", 4, 4, **kwargs)


def projection_pair(**kwargs: object) -> tuple[nn.Module, nn.Module]:
    return pair("BasicBlock", 4, 6, 2, **kwargs)


def sample(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*(shape or (3, 4, 6, 6)), dtype=dtype)


@dataclass(frozen=True)
class Outcome:
    """One forward and backward: y, dx, the parameters' gradients and the buffers by name, and y's strides."""

    tensors: dict[str, Tensor | None]
    strides: tuple[int, ...]
    random_state: Tensor


def observe(
    module: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    owner: nn.Module | None = None,
    backward: bool = True,
    context: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Outcome:
    """Run `module` on x; `owner` has the parameters where `module` is a function or a wrapper."""
    owner = module if owner is None else owner
    owner.zero_grad()
    leaf = x.detach()
    if backward:
        leaf.requires_grad_()
    before = leaf.detach().clone()
    torch.manual_seed(1)
    with context():
        y = module(leaf)
    after = torch.get_rng_state()
    assert_same("x itself", leaf.detach(), before, exact=True)
    tensors = {"y": y.detach()}
    if backward:
        assert y.requires_grad
        y.backward(torch.randn(y.shape, dtype=torch.float64).to(y.dtype))
        tensors["dx"] = leaf.grad
        tensors |= {f"d {name}": parameter.grad for name, parameter in owner.named_parameters()}
    tensors |= {name: buffer.clone() for name, buffer in owner.named_buffers()}
    return Outcome(tensors, y.stride(), after)


def assert_same(name: str, actual: Tensor | None, expected: Tensor | None, *, exact: bool) -> None:
    """Equal to the last bit, or, in fp64, to 1e-12 of the tensor's largest value.

    At least of dy's size, which is one: a gradient that reaches a parameter through a batch norm may cancel.
    """
    if expected is None or actual is None:
        assert actual is expected, f"{name}: {actual} instead of {expected}"
        return
    assert type(actual) is type(expected), f"{name} is a {type(actual).__name__}, not a {type(expected).__name__}"
    assert actual.dtype == expected.dtype, f"{name} is {actual.dtype}, not {expected.dtype}"
    assert actual.shape == expected.shape, f"{name} is {tuple(actual.shape)}, not {tuple(expected.shape)}"
    if exact or not expected.is_floating_point():
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{name}: {m}")
        return
    assert expected.dtype == torch.float64, f"{name}: compare {expected.dtype} with assert_as_accurate_as_eager"
    finite = expected[expected.isfinite()].abs()
    bar = FP64_BAR * max(1.0, finite.max().item() if finite.numel() else 0.0)
    torch.testing.assert_close(actual, expected, rtol=0, atol=bar, equal_nan=True, msg=lambda m: f"{name}: {m}")


def assert_same_outcome(actual: Outcome, expected: Outcome, *, exact: bool) -> None:
    assert list(actual.tensors) == list(expected.tensors)
    for name, tensor in expected.tensors.items():
        assert_same(name, actual.tensors[name], tensor, exact=exact)
    assert actual.strides == expected.strides, f"y has strides {actual.strides}, not {expected.strides}"
    assert torch.equal(actual.random_state, expected.random_state), "the random state after the forward differs"


def assert_path(choices: list[dispatch.Choice], path: str) -> None:
    """Whether the blocks ran "fused", by the backend under test, or took their "eager" path."""
    small = [choice for choice in choices if choice.objections.get("fused", "").startswith("the input is small")]
    refusals = [choice for choice in choices if choice.backend == "eager path" and choice not in small]
    if path == "eager":
        assert refusals, "no block took its eager path"
    else:
        assert not refusals, f"the eager path was taken: {refusals}"
        expected = dispatch._forced or dispatch.ORDER[0].name
        served = any(choice.backend == expected for choice in choices)
        objected = all(expected in choice.objections for choice in choices)
        assert served or objected or small, f"not served by {expected}: {choices}"


def assert_matches_eager(
    fused: nn.Module,
    eager: nn.Module,
    x: Tensor,
    *,
    path: str = "fused",
    backward: bool = True,
    context: Callable[[], AbstractContextManager[object]] = nullcontext,
    exact: bool | None = None,
) -> None:
    """Same y, gradients, buffers, strides and random draws, by the path named; exact where aten ran it."""
    with dispatch.recording(fused) as choices:
        actual = observe(fused, x, backward=backward, context=context)
    assert_path(choices, path)
    expected = observe(eager, x, backward=backward, context=context)
    if exact is None:
        exact = {choice.backend for choice in choices} <= {"reference", "eager path"}
    assert_same_outcome(actual, expected, exact=exact)


def assert_as_accurate_as_eager(
    build: Callable[[], tuple[nn.Module, nn.Module]],
    x: Callable[[], Tensor],
    *,
    seeds: int = 6,
    context: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> None:
    """In a lower precision: eager's dtypes and strides, and, over all seeds, as near to fp64 as eager.

    By the median: a ReLU whose input rounds to the other side of zero costs one seed most of its gradient, ours or
    eager's by luck.
    """
    ratios: dict[str, list[float]] = {}
    for seed in range(seeds):
        torch.manual_seed(seed)
        fused, eager = build()
        given = x()
        truth = observe(copy.deepcopy(eager).double(), given.double()).tensors
        with dispatch.recording(fused) as choices:
            actual = observe(fused, given, context=context)
        assert_path(choices, "fused")
        expected = observe(eager, given, context=context)
        if {choice.backend for choice in choices} == {"reference"}:
            assert_same_outcome(actual, expected, exact=True)
            continue
        assert list(actual.tensors) == list(expected.tensors)
        assert actual.strides == expected.strides
        floor = torch.finfo(expected.tensors["y"].dtype).eps / 8
        for name, tensor in expected.tensors.items():
            ours = actual.tensors[name]
            assert ours.dtype == tensor.dtype, f"{name} is {ours.dtype}, not {tensor.dtype}"
            if tensor.is_floating_point():
                error, eagers = (max(_error(t, truth[name]), floor) for t in (ours, tensor))
                ratios.setdefault(name, []).append(math.log(error / eagers))
    if ratios:
        everything = [ratio for of_one in ratios.values() for ratio in of_one]
        times = math.exp(median(everything))
        assert times <= 1.1, f"errors are {times:.2f} times eager's"
        for name, of_one in ratios.items():
            assert median(of_one) <= math.log(2), f"{name}: errors are {math.exp(median(of_one)):.2f} times eager's"


def _error(actual: Tensor, truth: Tensor) -> float:
    return ((actual.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


def assert_same_error(fused: nn.Module, eager: nn.Module, x: Tensor) -> None:
    """Eager refuses this, and so do we, in the same words."""
    with pytest.raises(Exception) as expected:  # noqa: PT011
        eager(x).sum().backward()
    with pytest.raises(type(expected.value)) as actual:
        fused(x).sum().backward()
    assert str(actual.value) == str(expected.value)

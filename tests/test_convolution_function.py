"""A convolution that is no segment's as a function of its own: the stem's, and the one before a squeeze."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision_models import resnet
from training_steps import ATEN, Operations, channels_last, relative_error

import fusedres
from fusedres import dispatch, segment
from fusedres.bench.work import held_bytes

pytestmark = pytest.mark.usefixtures("native")

BF16 = torch.bfloat16
CONVOLUTIONS: dict[str, Callable[[], nn.Conv2d]] = {
    "stem": lambda: nn.Conv2d(3, 32, 7, 2, 3, bias=False),
    "3x3": lambda: nn.Conv2d(20, 33, 3, padding=1),
    "strided": lambda: nn.Conv2d(33, 20, 3, 2, 1, bias=False),
    "1x1": lambda: nn.Conv2d(24, 40, 1),
}
Step = dict[str, Tensor]


def made(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Conv2d, Tensor]:
    torch.manual_seed(0)
    conv = CONVOLUTIONS[name]().to(dtype=dtype, memory_format=torch.channels_last)
    return conv, channels_last(torch.randn(2, conv.in_channels, 16, 14).to(dtype))


def step(call: Callable[[Tensor], Tensor], conv: nn.Conv2d, x: Tensor, autocast: bool) -> Step:
    """The result and every gradient."""
    conv.zero_grad()
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    with torch.autocast("cpu", BF16, enabled=autocast):
        y = call(leaf)
    g = torch.Generator().manual_seed(1)
    y.backward(channels_last(torch.randn(y.shape, generator=g).to(y.dtype)))
    assert leaf.grad is not None
    gradients = {name: p.grad for name, p in conv.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": leaf.grad} | gradients


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_it_is_the_modules_by_the_kernels(name: str, autocast: bool) -> None:
    conv, x = made(name, torch.float32 if autocast else BF16)
    with Operations() as ours:
        found = step(lambda x: segment.convolve(conv, x), conv, x, autocast)
    eager = step(conv, conv, x, autocast)
    exact = step(twin := copy.deepcopy(conv).double(), twin, x.double(), False)
    strides = conv.stride != (1, 1)
    assert ours.kernels == ATEN | {"conv": 2 - strides, "conv_dx": int(strides), "conv_dweight": 1}
    assert ours.count["convolution"] == 0
    for of, expected in exact.items():
        assert (found[of].dtype, found[of].stride()) == (eager[of].dtype, eager[of].stride()), of
        assert relative_error(found[of], expected) <= 1.1 * relative_error(eager[of], expected), of


@pytest.mark.parametrize("case", ["contiguous", "float64", "float32", "no_grad", "hook", "groups", "subclass"])
def test_what_the_kernels_dont_compute_is_the_modules(case: str) -> None:
    conv, x = made("3x3", BF16)
    if case == "contiguous":
        conv, x = conv.to(memory_format=torch.contiguous_format), x.contiguous()
    elif case in ("float64", "float32"):
        conv, x = made("1x1", getattr(torch, case))
    elif case == "hook":
        conv.register_forward_hook(lambda module, given, y: -y)
    elif case == "groups":
        conv = nn.Conv2d(20, 40, 3, groups=2).to(dtype=BF16, memory_format=torch.channels_last)
    elif case == "subclass":
        x = nn.Parameter(x)
    with torch.set_grad_enabled(case != "no_grad"), Operations() as operations:
        found = segment.convolve(conv, x)
    assert torch.equal(found, conv(x)) and not any(operations.kernels.values())


def test_errors_are_the_modules() -> None:
    conv, x = made("3x3", BF16)
    for bad in (channels_last(x[:, :3]), x[:, :, :0], x.float(), x[0]):
        reasons = []
        for call in (lambda bad=bad: segment.convolve(conv, bad), lambda bad=bad: conv(bad)):
            try:
                reasons.append(call().shape)
            except RuntimeError as error:
                reasons.append(str(error))
        assert reasons[0] == reasons[1]


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_gradients_that_nobody_wants_are_not_computed(frozen: str) -> None:
    conv, x = made("3x3", BF16)
    x.requires_grad_(frozen != "x")
    for name, parameter in conv.named_parameters():
        parameter.requires_grad_(name != frozen)
    with Operations() as operations:
        segment.convolve(conv, x).square().sum().backward()
    assert operations.kernels["conv"] == 1 + (frozen != "x")
    assert operations.kernels["conv_dweight"] == (frozen != "weight")
    assert (x.grad is None) == (frozen == "x")
    assert all((p.grad is None) == (name == frozen) for name, p in conv.named_parameters())


def test_it_holds_no_more_than_eager() -> None:
    """Of a stem under autocast: the images in bfloat16 alone, since the kernels round a weight as they read it."""
    conv, x = made("stem")

    def held(call: Callable[[Tensor], Tensor]) -> int:
        def forward() -> Tensor:
            with torch.autocast("cpu", BF16):
                return call(x)

        return held_bytes(forward)[-1]

    assert held(lambda x: segment.convolve(conv, x)) == held(conv) - 2 * conv.weight.numel()
    given = x.clone(memory_format=torch.preserve_format)
    with torch.autocast("cpu", BF16):
        y = segment.convolve(conv, given)
    images = weakref.ref(given)
    del given
    assert y.requires_grad and images() is None


@pytest.mark.parametrize("name", ["stem", "3x3"])
def test_second_derivatives_are_atens(name: str) -> None:
    conv, x = made(name, BF16)
    found = []
    for call in (lambda x: segment.convolve(conv, x), conv):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = call(leaf)
        operands = leaf, *conv.parameters()
        first = torch.autograd.grad(y.square().sum(), operands, create_graph=True)
        found.append(torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), operands))
    for ours, theirs in zip(*found, strict=True):
        assert relative_error(ours, theirs) <= 0.02


# Inductor leaves out the rounding of a bias that autocast converts.
@pytest.mark.parametrize("name, autocast", [("stem", True), ("stem", False), ("strided", True), ("1x1", False)])
def test_compiled_it_is_the_same_bits_in_one_graph(name: str, autocast: bool) -> None:
    torch.compiler.reset()
    conv, x = made(name, torch.float32 if autocast else BF16)
    plain = step(lambda x: segment.convolve(conv, x), conv, x, autocast)
    found = step(torch.compile(lambda x: segment.convolve(conv, x), fullgraph=True), conv, x, autocast)
    for of, expected in plain.items():
        assert torch.equal(found[of], expected), of


def test_a_network_trains_without_atens_convolutions() -> None:
    torch.manual_seed(0)
    model = resnet.resnet18(num_classes=10).to(memory_format=torch.channels_last)
    fusedres.fuse(model)
    x = channels_last(torch.randn(4, 3, 64, 64))
    with dispatch.any_size(), Operations() as operations:
        with torch.autocast("cpu", BF16):
            y = model(x)
        y.float().square().sum().backward()
    assert operations.count["convolution"] == operations.count["convolution_backward"] == 0
    assert operations.kernels["conv_dweight"] == 20
    assert operations.kernels["conv_dx"] + operations.kernels["conv_dx_"] == 3 + 3

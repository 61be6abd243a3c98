"""The compiled end of optimized models, a mean and a fully connected layer; test_native_backend.py has every
instruction set."""

from __future__ import annotations

import copy

import pytest
import torch
from optimized import batch, error, make, optimized, outputs
from torch import Tensor, nn
from training_steps import channels_last

pytestmark = pytest.mark.usefixtures("native")

DTYPES = (torch.float32, torch.bfloat16)


def mean(x: Tensor, dtype: torch.dtype) -> Tensor:
    y = torch.full((*x.shape[:2], 1, 1), 7, dtype=dtype)
    torch.ops.fusedres_native.mean_out(x, y)
    return y


def connect(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = torch.full((x.shape[0], weight.shape[0]), 7, dtype=weight.dtype)
    torch.ops.fusedres_native.connect_out(x, weight, bias, y)
    return y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 16, 33, 512])
@pytest.mark.parametrize("size", [(1, 1), (7, 7), (3, 5), (56, 56)], ids=str)
def test_a_mean_is_as_accurate_as_eagers(size: tuple[int, int], channels: int, dtype: torch.dtype) -> None:
    x = channels_last((torch.randn(3, channels, *size) + 1).to(dtype))
    exact = x.double().mean((2, 3), keepdim=True)
    epsilon = torch.finfo(torch.float32).eps
    assert error(mean(x, torch.float32), exact) <= 2 * epsilon
    assert torch.equal(mean(x, dtype), mean(x, torch.float32).to(dtype))


@pytest.mark.parametrize("images", [1, 2, 4, 9])
@pytest.mark.parametrize("inputs, outputs", [(1, 1), (16, 16), (33, 7), (2048, 1000), (24, 40)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_layer_is_rounded_once(images: int, inputs: int, outputs: int, has_bias: bool) -> None:
    x, weight = torch.randn(images, inputs), torch.randn(outputs, inputs).bfloat16()
    bias = torch.randn(outputs) if has_bias else None
    exact = nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    found = connect(x, weight, bias)
    # Within half a rounding, and what sums of `inputs` terms lose.
    terms = x.double().abs() @ weight.double().abs().T
    allowed = exact.abs() * 2**-8 + terms * 2**-21
    assert ((found.double() - exact).abs() <= allowed).all()
    assert torch.equal(connect(x[:1], weight, bias), found[:1])  # whatever its neighbours are


def test_values_that_are_not_finite_stay_where_they_are() -> None:
    x, weight = torch.randn(5, 20), torch.randn(18, 20).bfloat16()
    expected = connect(x, weight, None)
    x[2, 3], weight[17, 4] = float("nan"), float("inf")
    found = connect(x, weight, None)
    assert found[2].isnan().all() and not found[:, 17].isfinite().any()
    rest = [0, 1, 3, 4]
    assert torch.equal(found[rest, :17], expected[rest, :17])
    images = channels_last(torch.randn(2, 20, 3, 3))
    images[1, 4, 0, 0] = float("inf")
    assert mean(images, torch.float32).isinf().nonzero().tolist() == [[1, 4, 0, 0]]


def test_what_the_kernels_cant_do_is_refused() -> None:
    x, y = channels_last(torch.randn(2, 8, 3, 3)), torch.empty(2, 8, 1, 1)
    rows, weight, z = torch.randn(2, 8), torch.randn(4, 8).bfloat16(), torch.empty(2, 4).bfloat16()
    operators = torch.ops.fusedres_native
    for call, arguments, reason in (
        (operators.mean_out, (x.contiguous(), y), "x must be in channels_last"),
        (operators.mean_out, (x.half(), y), "x must be float32 or bfloat16"),
        (operators.mean_out, (x, y.bfloat16()), "y must have x's dtype or float32"),
        (operators.mean_out, (x, y[:1]), "a value for every channel"),
        (operators.mean_out, (channels_last(torch.empty(2, 8, 0, 3)), y), "a value for every channel"),
        (operators.connect_out, (rows.bfloat16(), weight, None, z), "in float32"),
        (operators.connect_out, (rows[:, :7], weight, None, z), "contiguous"),
        (operators.connect_out, (rows, weight.float(), None, z), "in bfloat16"),
        (operators.connect_out, (rows, weight, weight[0], z), "the bias must be"),
        (operators.connect_out, (rows, weight, None, z[:1]), "y must be"),
    ):
        with pytest.raises(RuntimeError, match=reason):
            call(*arguments)


def test_opcheck_without_exemptions() -> None:
    x, y = channels_last(torch.randn(2, 8, 3, 3)), torch.empty(2, 8, 1, 1)
    torch.library.opcheck(torch.ops.fusedres_native.mean_out.default, (x, y))
    rows, weight, z = torch.randn(2, 8), torch.randn(4, 8).bfloat16(), torch.empty(2, 4).bfloat16()
    torch.library.opcheck(torch.ops.fusedres_native.connect_out.default, (rows, weight, torch.randn(4), z))


class Ending(nn.Module):
    """As torchvision's networks end; `reads` looks at the mean as well."""

    def __init__(self, *, reads: bool = False) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 512, 3, bias=False), nn.BatchNorm2d(512)
        self.pool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(512, 300)
        self.reads = nn.Hardtanh(-9, 9) if reads else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.norm(self.conv(x))))
        return self.fc(torch.flatten(self.reads(x), 1))


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("reads", [True, False])
def test_a_mean_is_not_rounded_before_the_layer_that_alone_reads_it(reads: bool, autocast: bool) -> None:
    model = make(lambda: Ending(reads=reads)).to(torch.float32 if autocast else torch.bfloat16)
    ours, _ = optimized(model)
    x = torch.cat([batch(9) for _ in range(8)]).to(model.fc.weight.dtype)
    exact = outputs(copy.deepcopy(model).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, theirs = outputs(ours, x), outputs(model, x)
        assert found.dtype is theirs.dtype is torch.bfloat16
        assert torch.equal(outputs(ours, x), found)
        assert error(found, exact) <= (1.1 if reads else 0.97) * error(theirs, exact)
        with torch.no_grad():
            ours.fc.weight.mul_(-2)
            ours.fc.bias.mul_(-2)
        assert torch.equal(outputs(ours, x), -2 * found)
        wrong = torch.randn(2, 4, 9, 9, dtype=x.dtype)
        with pytest.raises(RuntimeError):
            outputs(ours, wrong)

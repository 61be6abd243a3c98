"""Tests of the Triton backend's conv_act in its interpreter; `test_triton_interpreted.py` runs them in a process of
their own."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from interpreted import INTERPRETED
from interpreted_products import MUTANTS
from measured_times import forget, pretend
from optimized import assert_close, images, make, outputs
from product_cases import CASES, DTYPES, Case, configs, error_and_bar, require_every_configuration_within_the_bar
from test_conv_act import eager, operands
from torch import Tensor, nn

import fusedres
from fusedres import dispatch
from fusedres.backends import Filter, Geometry
from fusedres.backends.triton import launch, product
from fusedres.backends.triton.blocking import HALF, SINGLE
from fusedres.backends.triton.convolution import CONVOLUTION
from fusedres.epilogue import CATALOGUE, RELU
from fusedres.ops import conv_act

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, at infinities and NaN


@pytest.fixture(autouse=True, scope="module")
def interpreted() -> Iterator[None]:
    fusedres.ops.register_backend(INTERPRETED)
    yield
    fusedres.ops.unregister_backend(INTERPRETED)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_configuration_is_within_the_bar(case: Case, dtype: torch.dtype) -> None:
    require_every_configuration_within_the_bar("interpreted", case, dtype)


@pytest.mark.parametrize("act", [row.name for row in CATALOGUE])
def test_every_activation_is_within_the_bar(act: str) -> None:
    x, weight, bias, residual = operands((2, 24, 5, 3), (20, 24, 1, 1), {}, torch.bfloat16, "channels_last")
    with fusedres.use_backend("interpreted"):
        y = conv_act(x, weight, bias, residual=residual, act=act)
    error, bar = error_and_bar(y, x, weight, bias, residual, act, (1, 1))
    assert error <= bar


@pytest.mark.parametrize("described", [False, True])
def test_nan_and_infinity_stay_where_they_belong(described: bool) -> None:
    x, weight, _, residual = operands((2, 16, 5, 5), (24, 16, 1, 1), {}, torch.float16, "channels_last")
    x[0, 3, 1, 2], x[1, 5, 4, 4], residual[1, 2, 0, 0] = torch.nan, torch.inf, -torch.inf
    blocks = next(c for c in configs(x, weight, (1, 1)) if c.descriptors == described)
    with fusedres.use_backend("interpreted"), launch.forced(HALF, blocks):
        y = conv_act(x, weight, residual=residual)
    expected = eager(x, weight, None, residual, "relu", {})
    assert y.isnan().any() and y.isinf().any() and torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y[y.isinf()], expected[expected.isinf()])
    exact = eager(*(t.double() for t in (x, weight)), None, residual.double(), "relu", {})
    finite = expected.isfinite()
    assert (y - exact)[finite].norm() <= 1.1 * (expected - exact)[finite].norm()


def is_one_rounding(y: torch.Tensor, exact: torch.Tensor) -> bool:
    """Whether y is as close as rounding once is; what isn't a number is not."""
    return bool((y - exact).norm() <= 1.1 * (exact.to(y.dtype) - exact).norm())


def test_a_scale_a_wide_bias_and_a_residual_that_is_written_over() -> None:
    x, weight, _, residual = operands((2, 24, 5, 3), (20, 24, 1, 1), {}, torch.bfloat16, "channels_last")
    bias, scale = torch.randn(20), torch.rand(20) + 1
    exact = F.conv2d(x.double(), weight.double()) * scale.view(-1, 1, 1) + bias.view(-1, 1, 1) + residual
    taps = CONVOLUTION.pack(Filter(weight[:, ::1], bias, scale), Geometry(), x.shape, True)
    y = CONVOLUTION.run(x, taps, residual, Geometry(), RELU, True)
    assert y is residual
    assert is_one_rounding(y, exact.relu())


def test_a_weight_of_any_strides_is_taken() -> None:
    x = images(2, 24, 5, 3).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(20, 48, 1, 1)[:, ::2]
    with fusedres.use_backend("interpreted"):
        torch.testing.assert_close(conv_act(x, weight, act="identity"), F.conv2d(x, weight))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The tilings of what is launched."""
    found: list[Any] = []
    before = launch.launch

    def note(kernel: Any, grid: Any, arguments: Any, constants: dict[str, Any], warps: int) -> None:
        found.append(constants["TILING"])
        before(kernel, grid, arguments, constants, warps)

    monkeypatch.setattr(launch, "launch", note)
    return found


def test_descriptors_read_what_they_can_describe_and_pointers_the_rest(launched: list[Any]) -> None:
    def run(x: Tensor, weight: Tensor, stride: int = 1) -> bool:
        with fusedres.use_backend("interpreted"):
            y = conv_act(x, weight, act="identity", stride=stride)
        torch.testing.assert_close(y, F.conv2d(x, weight, stride=stride))
        return launched.pop().descriptors.value

    x, weight, *_ = operands((2, 64, 9, 7), (32, 64, 1, 1), {}, torch.bfloat16, "channels_last")
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(2, 9, 7, 64).permute(0, 3, 1, 2).copy_(x)
    assert run(x, weight)
    assert not run(x, weight, stride=2)
    assert not run(shifted, weight)
    assert not run(x, torch.empty(weight.numel() + 1, dtype=x.dtype)[1:].view_as(weight).copy_(weight))
    odd, few, *_ = operands((2, 36, 9, 7), (32, 36, 1, 1), {}, torch.bfloat16, "channels_last")
    assert not run(odd, few)


def test_what_eager_refuses_is_refused_in_its_words() -> None:
    x, taps = images(2, 8, 4, 4), Filter(torch.randn(4, 16, 1, 1))
    with pytest.raises(RuntimeError, match="to have 16 channels, but got 8 channels"):
        CONVOLUTION.run(x, taps, None, Geometry(), RELU, False)
    with pytest.raises(RuntimeError, match="expected scalar type Double"):
        CONVOLUTION.run(x.double(), Filter(torch.randn(4, 8, 1, 1)), None, Geometry(), RELU, False)
    empty = CONVOLUTION.run(x[:0], Filter(torch.randn(4, 8, 1, 1)), None, Geometry(), RELU, False)
    assert empty.shape == (0, 4, 4, 4)


@triton.jit
def kept_offsets(out, first, channels):
    row = first + tl.arange(0, 2)
    channel = tl.arange(0, 4)
    tl.store(out + tl.arange(0, 2)[:, None] * 4 + channel[None, :], product.offsets_of(row, channel, channels))


def test_offsets_pass_2_31() -> None:
    out = torch.zeros(2, 4, dtype=torch.int64)
    launch.launch(kept_offsets, (1,), (out, 50_000_000, 64), {}, 1)
    assert out.tolist() == [[row * 64 + channel for channel in range(4)] for row in (50_000_000, 50_000_001)]


def wrong(case: Case, *, described: bool) -> bool:
    """Whether the smallest tiles fail a case, with all that a kernel can be given."""
    shape, outputs, stride = case
    x, weight, bias, residual = operands(
        shape, (outputs, shape[1], 1, 1), {"stride": stride}, torch.float32, "channels_last"
    )
    x, weight, residual = (t.half() for t in (x, weight, residual))
    scale = torch.rand(outputs) + 1
    found = [c for c in configs(x, weight, stride) if c.descriptors == described]
    if not found:
        return False
    exact = F.conv2d(x.double(), weight.double(), stride=stride) * scale.view(-1, 1, 1) + bias.view(-1, 1, 1) + residual
    try:
        with launch.forced(HALF, found[-1]):
            y = CONVOLUTION.run(x, Filter(weight, bias, scale), residual, Geometry(stride), RELU, False)
    except Exception as error:  # the interpreter wraps what a kernel raises in an exception of its own
        if "outside the tensors of its launch" not in str(error):
            raise
        return True
    return not is_one_rounding(y, exact.relu())


def test_the_right_kernel_fails_no_mutation_case() -> None:
    assert not any(wrong(case, described=described) for case in CASES for described in (False, True))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_wrong_kernel_fails(mutant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, MUTANTS[mutant], mutant)
    assert any(wrong(case, described=described) for case in CASES for described in (False, True))


def network() -> nn.Module:
    """Five convolutions, of which four are 1x1: one adds a residual, one has a stride."""
    return make(
        lambda: nn.Sequential(fusedres.Bottleneck(3, 8, stride=2), nn.Conv2d(32, 24, 1), nn.ReLU(), nn.Flatten())
    )


def chosen(model: nn.Module, x: Tensor) -> list[dispatch.Choice]:
    with torch.no_grad():
        return [choice for choice in fusedres.explain(model, x).choices if choice.op == "conv_act"]


@pytest.mark.usefixtures("fresh_times")
def test_an_optimized_model_takes_it_only_where_it_was_measured_to_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    eager_model, x = network(), images(2, 3, 16, 16)
    by_rule, by_times, later = (copy.deepcopy(eager_model) for _ in range(3))

    fusedres.optimize(by_rule)
    choices = chosen(by_rule, x)
    assert "interpreted" not in {choice.backend for choice in choices}
    reasons = [choice.objections["interpreted"].partition(";")[0] for choice in choices]
    assert sorted(set(reasons)) == ["it was not measured to be faster here", "its convolutions are 1x1"]

    asked = pretend(monkeypatch, {f"interpreted {blocks}": 1.0 for blocks in SINGLE.configs})
    report = fusedres.optimize(by_times, example=x)
    served = [line for line in report.convolutions if line.backend == "interpreted"]
    assert len(served) == reasons.count("it was not measured to be faster here") == 4
    assert all((line.reason or "").startswith("interpreted 64x32x32 1 ms, ") for line in served)
    assert_close(outputs(by_times, x), eager_model, x)

    measured = len(asked)
    forget()
    fusedres.optimize(later)
    assert [choice.backend for choice in chosen(later, x)].count("interpreted") == 4 and len(asked) == measured
    assert all(("interpreted" in c.objections) != (c.backend == "interpreted") for c in chosen(later, x))

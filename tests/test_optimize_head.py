"""What follows the last convolution of an optimized network: the mean of its pixels, and the fully connected layer."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from optimized import assert_close, batch, error, make, optimized, outputs, root_mean_square
from torch import Tensor, nn

import fusedres


def network(*head: nn.Module) -> nn.Module:
    return make(lambda: nn.Sequential(nn.Conv2d(3, 24, 3), nn.BatchNorm2d(24), nn.ReLU(), *head))


def classifier(outputs: int = 40, bias: bool = True) -> nn.Module:
    return network(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, outputs, bias=bias))


def linear_of(model: nn.Module) -> nn.Linear:
    (linear,) = (module for module in model.modules() if isinstance(module, nn.Linear))
    return linear


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Lets the module's own forward fail from now on."""

    def forward(module: nn.Linear, x: Tensor) -> Tensor:
        raise AssertionError("the module was called")

    return lambda: monkeypatch.setattr(nn.Linear, "forward", forward)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_in_bf16_a_fully_connected_layer_is_packed_once(
    autocast: bool, bias: bool, refuse: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = torch.float32 if autocast else torch.bfloat16
    model = classifier(bias=bias).to(dtype)
    ours, _ = optimized(model)
    x = batch(9, dtype=dtype)
    exact = outputs(copy.deepcopy(model).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        theirs = outputs(model, x)
        changed = copy.deepcopy(model)
        with torch.no_grad():
            linear_of(changed).weight.mul_(-2)
        theirs_changed = outputs(changed, x)
        refuse()
        found = outputs(ours, x)
        assert found.dtype == theirs.dtype == torch.bfloat16 and found.shape == theirs.shape
        assert error(found, exact) <= 1.1 * error(theirs, exact)
        linear = linear_of(ours)
        with torch.no_grad():
            linear.weight.mul_(-2)
        expected = -2 * exact if not bias else 3 * linear.bias.double() - 2 * exact
        assert error(outputs(ours, x), expected) <= 1.1 * error(theirs_changed, expected)


def doubled(module: nn.Module, given: tuple[Tensor, ...], y: Tensor) -> Tensor:
    return 2 * y


@pytest.mark.usefixtures("native")
def test_others_are_called_as_they_are(refuse: Callable[[], None]) -> None:
    x = batch(9)
    hooked = classifier()
    linear_of(hooked).register_forward_hook(doubled)
    unhooked = classifier()
    ours = [optimized(model)[0] for model in (hooked, unhooked)]
    with torch.autocast("cpu", torch.bfloat16):
        exact = outputs(copy.deepcopy(hooked).double(), x.double())
        assert error(outputs(ours[0], x), exact) <= 1.1 * error(outputs(hooked, x), exact)
    assert_close(outputs(ours[1], x), unhooked, x)
    refuse()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(AssertionError, match="the module was called"):
        outputs(ours[0], x)
    with pytest.raises(AssertionError, match="the module was called"):
        outputs(ours[1], x)


@pytest.mark.usefixtures("native")
def test_a_layer_over_every_pixel_is_linears_own() -> None:
    model = network(nn.Flatten(2), nn.Linear(49, 7)).bfloat16()
    ours, _ = optimized(model)
    # In our layout: aten's fully connected layer rounds once more where its input is not contiguous.
    x = torch.cat([batch(9, dtype=torch.bfloat16) for _ in range(64)]).to(memory_format=torch.channels_last)
    exact = outputs(copy.deepcopy(model).double(), x.double())
    assert error(outputs(ours, x), exact) <= 1.1 * error(outputs(model, x), exact)


@pytest.mark.usefixtures("native")
def test_a_wrong_number_of_inputs_gets_eagers_error() -> None:
    model = network(nn.Flatten(), nn.Linear(24 * 49, 7)).bfloat16()
    ours, _ = optimized(model)
    outputs(ours, batch(9, dtype=torch.bfloat16))
    wrong = batch(10, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError) as theirs:
        outputs(model, wrong)
    with pytest.raises(RuntimeError) as found:
        outputs(ours, wrong)
    assert str(found.value) == str(theirs.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1, (1, 1), (1, None), 2, (3, 1)], ids=str)
def test_averages_are_eagers(size: int | tuple[int, int], dtype: torch.dtype) -> None:
    errors = []
    for seed in range(6):
        torch.manual_seed(seed)
        exact_copy = nn.Conv2d(24, 24, 1, bias=False)  # so that the averages lie in memory of the plan
        nn.init.dirac_(exact_copy.weight)
        model = network(nn.AdaptiveAvgPool2d(size), exact_copy).to(dtype)
        ours, _ = optimized(model)
        for height, width in ((9, 9), (12, 7), (3, 3), (31, 30)):
            x = torch.randn(8, 3, height, width).to(dtype)
            exact = outputs(copy.deepcopy(model).double(), x.double())
            found, theirs = outputs(ours, x), outputs(model, x)
            assert found.shape == theirs.shape
            errors.append((error(found, exact), error(theirs, exact)))
    found, theirs = (root_mean_square(of_one) for of_one in zip(*errors, strict=True))
    assert found <= max(1.1 * theirs, 2 * torch.finfo(torch.float64).eps)


def test_an_average_of_no_image_is_none() -> None:
    ours = classifier()
    fusedres.optimize(ours)
    assert outputs(ours, torch.randn(0, 3, 9, 9)).shape == (0, 40)
    with torch.autocast("cpu", torch.bfloat16):
        assert outputs(ours, torch.randn(0, 3, 9, 9)).shape == (0, 40)

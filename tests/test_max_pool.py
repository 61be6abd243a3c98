"""The compiled max-pool of optimized models; test_native_backend.py has every instruction set."""

from __future__ import annotations

import copy

import pytest
import torch
from optimized import assert_close
from torch import nn
from torch.nn.functional import max_pool2d
from training_steps import channels_last

import fusedres
from fusedres.inference import calls

pytestmark = pytest.mark.usefixtures("native")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WINDOWS = (((3, 3), (2, 2), (1, 1)), ((2, 2), (2, 2), (0, 0)), ((3, 2), (1, 3), (1, 1)), ((5, 5), (1, 1), (2, 2)))


def max_pool_out(*arguments: object) -> None:
    torch.ops.fusedres_native.max_pool_out(*arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("windows", WINDOWS)
def test_the_values_are_eagers(windows, dtype):
    g = torch.Generator().manual_seed(0)
    for channels in (1, 16, 33, 100):
        for size in ((7, 9), (12, 12), (5, 5)):
            for ceil_mode in (False, True):
                x = torch.randn(2, channels, *size, generator=g).round()  # with equal ones, and zeros of both signs
                for value in (float("nan"), -float("nan"), float("-inf"), float("inf")):
                    x.view(-1)[torch.randint(x.numel(), (x.numel() // 40 + 1,), generator=g)] = value
                x[:, :, 0] = float("-inf")
                x = channels_last(x.to(dtype))
                expected = max_pool2d(x, *windows, 1, ceil_mode)
                y = torch.full_like(expected, 7)
                max_pool_out(x, *windows, y)
                torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
                numbers = ~expected.isnan()
                assert torch.equal(y.signbit()[numbers], expected.signbit()[numbers])


def test_what_the_kernel_cant_do_is_refused():
    x = channels_last(torch.randn(2, 8, 9, 9))
    y = channels_last(torch.empty(2, 8, 5, 5))
    for arguments, reason in (
        ((x.contiguous(), *WINDOWS[0], y), "must be in channels_last"),
        ((x, *WINDOWS[0], y.bfloat16()), "y must have x's images, channels and dtype"),
        ((x, *WINDOWS[0], channels_last(torch.empty(2, 4, 5, 5))), "y must have x's images, channels and dtype"),
        ((x, *WINDOWS[0], channels_last(torch.empty(2, 8, 7, 5))), "y doesn't belong to these windows of x"),
        ((x, (3, 3), (2, 2), (3, 3), y), "y doesn't belong to these windows of x"),
    ):
        with pytest.raises(RuntimeError, match=reason):
            max_pool_out(*arguments)


def test_opcheck_without_exemptions():
    x = channels_last(torch.randn(2, 8, 9, 9))
    y = torch.empty_like(max_pool2d(x, *WINDOWS[0]))
    torch.library.opcheck(torch.ops.fusedres_native.max_pool_out.default, (x, *WINDOWS[0], y))


@pytest.mark.parametrize(
    "pool, own",
    [
        (nn.MaxPool2d(3, 2, 1), True),
        (nn.MaxPool2d((2, 3), ceil_mode=True), True),
        (nn.MaxPool2d(2, dilation=2), False),
    ],
    ids=repr,
)
def test_optimized_models_pool_with_it_where_it_has_the_windows(pool, own, monkeypatch):
    made = []
    alone = calls._pool_alone
    monkeypatch.setattr(calls, "_pool_alone", lambda *a: made.append(a) or alone(*a))
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), pool, nn.Conv2d(16, 16, 3)).eval()
    x = channels_last(torch.randn(2, 3, 21, 21))
    with torch.inference_mode():
        eager = copy.deepcopy(model)
        fusedres.optimize(model)
        model(x)
        assert_close(model(x), eager, x)
        assert bool(made) is own
        with fusedres.use_backend("reference"):
            del made[:]
            other = nn.Sequential(*model).eval()
            fusedres.optimize(other)
            other(x)
            other(x)
        assert not made

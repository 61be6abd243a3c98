"""The CUDA kernels and their binding, run on the host, against the same formulas in fp64.

tests/emulation_target.py says what this shows and what it can't.
"""

from __future__ import annotations

import itertools
import shutil
import sys
from collections.abc import Iterator

import emulation_target
import pytest
import python_backend
import test_native
import test_native_backend
import torch

from fusedres import build, numerics, testing

# name: multiprocessors, bytes of shared memory, cooperative launches. Of the shared memory 9 KB (fp64) or 4.5 KB are
# needed for reductions; a step takes 1 KB a tensor, or less where its elements are read one by one.
DEVICES = {
    "all on chip": (3, 227 << 10, 1),
    "much read again": (3, 10 << 10, 1),
    "two launches": (3, 227 << 10, 0),
    "more blocks": (7, 9 << 10, 1),
    "one block": (1, 12 << 10, 1),
}

NAMES = ("emulated", "reference")


@pytest.fixture
def emulated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The emulated device that the test names, or the first."""
    if sys.platform != "linux" or shutil.which("g++") is None:
        pytest.skip("the emulation needs Linux and g++")
    found = build.library(emulation_target.target())
    assert isinstance(found, build.Library), found.reason
    device = DEVICES[getattr(request, "param", "all on chip")]
    for name, value in zip(("MULTIPROCESSORS", "SHARED_BYTES", "COOPERATIVE"), device, strict=True):
        monkeypatch.setenv(f"FUSEDRES_EMULATED_{name}", str(value))
    monkeypatch.setattr(test_native, "operators", lambda: torch.ops.fusedres_emulated)
    with python_backend.registered(emulation_target.BACKEND):
        yield


pytestmark = pytest.mark.usefixtures("emulated")
on_every_device = pytest.mark.parametrize("emulated", DEVICES, indirect=True)


@on_every_device
@pytest.mark.parametrize("block", [0])
def test_bn_act_equals_the_formula_in_fp64(block: int) -> None:
    test_native.test_bn_act_equals_the_formula_in_fp64(block)


@on_every_device
def test_the_ends_of_residual_blocks_equal_the_formula_in_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch statistics, no gate, ReLU or nothing: these have kernels of their own, with several packs in flight."""
    shapes = [(3, 35, 9, 9), (2, 64, 12, 10), (5, 16, 14, 14)]
    grid = itertools.product(shapes, (torch.float32, torch.bfloat16), (False, True), (None, 0, 1), (1, 0))
    chosen = [
        test_native.Case(seed, shape, dtype, channels_last, act, 1, source_r)
        for seed, (shape, dtype, channels_last, source_r, act) in enumerate(grid)
    ]
    monkeypatch.setattr(test_native, "cases", lambda count: chosen)
    for block in range(8):
        test_native.test_bn_act_equals_the_formula_in_fp64(block)


@pytest.mark.parametrize("emulated", ["all on chip", "one block"], indirect=True)
def test_affine_act_equals_the_formula_in_fp64() -> None:
    test_native.test_affine_act_equals_the_formula_in_fp64(0)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", test_native.DTYPES, ids=str)
def test_special_values_pass_as_in_eager(dtype: torch.dtype, channels_last: bool) -> None:
    test_native.test_special_values_pass_as_in_eager(dtype, channels_last)


@on_every_device
@pytest.mark.parametrize("channels_last", [False, True])
def test_statistics_lose_nothing_to_a_large_mean_an_outlier_or_an_infinity(channels_last: bool) -> None:
    for ratio in (1e4, 1e6):
        for dtype in (torch.float32, torch.float64):
            test_native.test_a_mean_much_larger_than_the_deviation_costs_no_accuracy(ratio, dtype, channels_last)
    test_native.test_the_low_part_of_a_large_mean_counts_in_the_backward(channels_last)
    test_native.test_an_infinite_value_makes_the_mean_infinite_as_in_eager(channels_last)
    test_native.test_an_outlier_in_the_first_pixel_costs_no_accuracy()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("offset", [0, 8, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_alignment_gives_the_same_bits(dtype: torch.dtype, offset: int, channels_last: bool) -> None:
    """A tensor that does not begin on 16 bytes is read element by element, and sums keep their order of magnitude."""
    case = test_native.Case(0, (3, 16, 8, 8), dtype, channels_last, 1, 1, 0)
    aligned = case.bn_forward(torch.ops.fusedres_emulated.bn_act_forward, keep_mask=True)
    shifted = torch.empty(case.x.numel() + offset, dtype=dtype)[offset:].as_strided(case.x.shape, case.x.stride())
    assert (shifted.data_ptr() % 16 == 0) == (offset * dtype.itemsize % 16 == 0)
    case.x = shifted.copy_(case.x)
    found = case.bn_forward(torch.ops.fusedres_emulated.bn_act_forward, keep_mask=True)
    for ours, theirs in zip(found[:3], aligned[:3], strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("op", ["bn_act", "frozen bn_act", "affine_act"])
def test_norms_in_half_precision_are_converted_and_move(op: str) -> None:
    given = [t.bfloat16() for t in (torch.randn(4, 6, 8, 8), *torch.rand(2, 6), torch.zeros(6), torch.ones(6))]
    ulps = 2 * torch.finfo(torch.bfloat16).eps
    emulated, eager = (test_native_backend.results(name, test_native_backend.OPS[op], *given) for name in NAMES)
    for found, expected in zip(emulated, eager, strict=True):
        torch.testing.assert_close(found, expected, rtol=ulps, atol=ulps * expected.abs().max().item())


@pytest.mark.parametrize("emulated", ["all on chip", "much read again"], indirect=True)
def test_shared_cases_stay_within_the_bar() -> None:
    cases = testing.cases(320, large=0)
    rows = [row for case in cases for row in numerics.compare(case, "cpu")]
    alone = [row for row in rows if row.fails_alone()]
    assert len(rows) > 1000
    assert not alone, "\n".join(map(str, alone[:5]))


def test_a_result_that_memory_does_not_hold_is_told_in_eagers_words() -> None:
    """torch's stable interface passes on that there was an error, and not which."""
    x = torch.zeros(()).expand(2**23, 1, 2**23)
    with pytest.raises(RuntimeError, match=f"DefaultCPUAllocator: can't allocate memory for {2**46} elements"):
        torch.ops.fusedres_emulated.affine_act_forward(x, *[None] * 8, 1, False)

"""A training step's convolutions on the emulated tile unit; test_tiles.py says what that shows and what it can't."""

from __future__ import annotations

import ctypes
import mmap
import shutil
import sys

import pytest
import test_native_dweight as dweight
import test_native_training_bf16 as training
import tile_target
import torch

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("g++") is None, reason="the emulation needs Linux and g++"
)

Shape = dweight.Shape
DWEIGHT = (
    *dweight.DIRECT,
    # The two channel counts fill one tile each, or one and a bit; pixels a step, and one more or less.
    Shape(16, 16, (1, 1), (4, 8), padding=(0, 0), images=1),
    Shape(32, 16, (1, 1), (3, 11), padding=(0, 0), images=1),
    Shape(16, 48, (1, 1), (1, 31), padding=(0, 0), images=1),
    Shape(15, 33, (3, 4), (9, 8), padding=(2, 3)),  # 60 values of a row: two slices of a point
    Shape(33, 530, (1, 2), (20, 17), padding=(0, 1), images=1),  # two ranges of outputs
    Shape(120, 500, size=(26, 20)),  # two stretches of a group
)


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    operators = tile_target.operators()
    monkeypatch.setattr(dweight, "conv_dweight", operators.conv_dweight)
    monkeypatch.setattr(training, "operators", lambda: operators)


@pytest.mark.parametrize("shape", DWEIGHT, ids=repr)
def test_dweight_is_the_formula_in_fp64(shape):
    dweight.test_it_is_the_formula_in_fp64(shape, 1, torch.bfloat16)


ERRORS = (
    Shape(64, 64, size=(28, 28), images=4),
    Shape(64, 128, size=(28, 28), stride=(2, 2), images=4),
    Shape(64, 256, (1, 1), (56, 56), padding=(0, 0)),
    Shape(3, 64, (7, 7), (112, 112), stride=(2, 2), padding=(3, 3)),
)


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("shape", ERRORS, ids=repr)
def test_errors_of_dweight_are_far_below_those_of_eager(shape, positive):
    dweight.test_errors_are_far_below_those_of_eager_which_rounds_to_bfloat16(shape, 1, positive)


def at_the_end_of_memory(t: torch.Tensor) -> torch.Tensor:
    """A copy in channels_last before memory that can't be read."""
    size = -(-t.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    values = torch.frombuffer(memory, dtype=t.dtype, offset=size - t.nbytes, count=t.numel())
    last_page = ctypes.c_void_p(values.data_ptr() + t.nbytes)
    nothing_permitted = 0
    assert ctypes.CDLL(None).mprotect(last_page, mmap.PAGESIZE, nothing_permitted) == 0
    images, channels, rows, columns = t.shape
    return values.view(images, rows, columns, channels).permute(0, 3, 1, 2).copy_(t)


@pytest.mark.parametrize("shape", [dweight.DIRECT[index] for index in (2, 3, 5, 6, 8)], ids=repr)
def test_nothing_beyond_x_and_dy_is_read(shape):
    case = dweight.Case(shape)
    expected = case.found(1)
    case.x, case.dy = at_the_end_of_memory(case.x), at_the_end_of_memory(case.dy)
    assert torch.equal(case.found(1), expected)


def test_dweight_is_the_same_bits_whatever_the_threads():
    dweight.test_it_is_the_same_bits_whatever_the_threads(torch.bfloat16)


@pytest.mark.parametrize(
    "shape", [dweight.DIRECT[0], dweight.DIRECT[-1], Shape(150, 70, (1, 1), padding=(0, 0))], ids=repr
)
def test_many_threads_have_smaller_shares_and_the_same_bits(shape):
    threads = torch.get_num_threads()
    case = dweight.Case(shape)
    expected = case.found(1)
    try:
        for count in (4, 7, 40):
            torch.set_num_threads(count)
            assert torch.equal(case.found(1), expected), count
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("shape, operand, value", dweight.NOT_FINITE, ids=repr)
def test_values_that_are_not_finite_stay_where_eager_has_them(shape, operand, value):
    dweight.test_values_that_are_not_finite_stay_where_eager_has_them(shape, operand, value)


@pytest.mark.parametrize("tile", [1, 4])
def test_without_images_dweight_is_zero(tile):
    dweight.test_without_images_it_is_zero(tile)


def test_winograds_dweight_is_left_to_the_vector_unit():
    dweight.test_it_is_the_formula_in_fp64(dweight.WINOGRAD[1], 7, torch.bfloat16)


@pytest.mark.parametrize("shape", [*training.DIRECT, training.TILED[0]], ids=repr)
def test_y_and_dx_with_weights_packed_anew(shape):
    training.test_y_is_inferences(shape)
    if shape.geometry.stride == (1, 1):
        training.test_dx_is_the_formula_in_fp64(shape)


@pytest.mark.parametrize("shape", training.STRIDED, ids=repr)
def test_dx_of_strided_windows_is_the_formula_in_fp64(shape):
    training.test_dx_of_strided_windows_is_the_formula_in_fp64(shape, torch.bfloat16)

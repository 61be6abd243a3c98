"""The compiled gradient of a convolution's weights against fp64; test_native_backend.py has every instruction set."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from training_steps import channels_last, relative_error

pytestmark = pytest.mark.usefixtures("native")

Pair = tuple[int, int]


def conv_dweight(*arguments: object) -> Tensor:
    return torch.ops.fusedres_native.conv_dweight(*arguments)


@dataclass(frozen=True)
class Shape:
    inputs: int
    outputs: int
    kernel: Pair = (3, 3)
    size: Pair = (9, 9)
    stride: Pair = (1, 1)
    padding: Pair = (1, 1)
    dilation: Pair = (1, 1)
    images: int = 2

    @property
    def windows(self) -> tuple[Pair, Pair, Pair, Pair]:
        return self.kernel, self.stride, self.padding, self.dilation

    def outputs_of(self, axis: int) -> int:
        extent = self.dilation[axis] * (self.kernel[axis] - 1) + 1
        return (self.size[axis] + 2 * self.padding[axis] - extent) // self.stride[axis] + 1


# Channels that fill neither vectors nor panels nor blocks; odd rows and images, so that steps of two pixels straddle
# them; a last step of one pixel; few and many runs; groups of runs, and blocks of a large dweight.
DIRECT = (
    Shape(16, 32, size=(8, 8)),
    Shape(64, 64, (1, 1), (7, 9), padding=(0, 0), images=3),
    Shape(33, 47, (1, 1), (7, 5), padding=(0, 0), images=3),
    Shape(17, 40, (1, 1), (7, 9), stride=(2, 2), padding=(0, 0), images=3),
    Shape(48, 20, (1, 1), (6, 5), stride=(3, 2), padding=(1, 2)),
    Shape(33, 17, size=(11, 9), stride=(2, 2), images=3),
    Shape(3, 64, (7, 7), (23, 21), stride=(2, 2), padding=(3, 3), images=3),
    Shape(3, 17, (7, 7), (4, 5), padding=(6, 5)),
    Shape(3, 20, (3, 5), (6, 11), padding=(1, 4), dilation=(2, 2)),
    Shape(17, 33, (2, 3), (10, 9), stride=(1, 3), padding=(2, 0), dilation=(2, 1)),
    Shape(20, 9, size=(12, 13), padding=(2, 3), dilation=(2, 3)),
    Shape(1, 1, (1, 1), (1, 1), padding=(0, 0), images=1),
    Shape(5, 3, (1, 1), (3, 3), padding=(0, 0), images=1),
    Shape(70, 150, size=(33, 31), stride=(2, 2)),
    Shape(17, 12, (1, 1), (65, 67), padding=(0, 0), images=2),
    Shape(300, 260, (1, 1), (19, 17), padding=(0, 0), images=2),
    Shape(130, 90, size=(25, 23), images=1),
)
# 3x3 of stride 1.
WINOGRAD = (
    Shape(16, 32, size=(8, 8)),
    Shape(33, 47, size=(7, 10), images=3),
    Shape(3, 5, size=(3, 4), images=1),
    Shape(70, 20, size=(5, 9), padding=(2, 0)),
    Shape(17, 64, size=(25, 27), padding=(0, 2), images=1),
    Shape(40, 24, size=(57, 41), images=3),
    Shape(300, 30, size=(6, 6), images=8),
    Shape(150, 200, size=(20, 11), images=25),  # groups of runs, and parts of the channels
)
FORMS = [(shape, 1) for shape in DIRECT] + [(shape, tile) for shape in WINOGRAD for tile in (2, 4, 7)]
NOT_FINITE = [
    (shape, operand, value)
    for shape in (
        Shape(20, 9, size=(5, 7), images=1),
        Shape(3, 9, (3, 5), (5, 7), stride=(2, 2), padding=(1, 2), images=1),
        Shape(17, 9, (1, 1), (5, 7), padding=(0, 0), images=1),
    )
    for operand in ("x", "dy")
    for value in (math.nan, math.inf, -math.inf)
]
# Of float32 sums; a tile of 7 loses a digit more.
MOST_ERROR = {1: 1e-6, 2: 1e-6, 4: 2e-6, 7: 2e-5}


class Case:
    """Random operands of one shape, with eager's gradient in any dtype."""

    def __init__(self, shape: Shape, positive: bool = False, dtype: torch.dtype = torch.bfloat16) -> None:
        g = torch.Generator().manual_seed(0)
        self.shape = shape
        x = torch.randn(shape.images, shape.inputs, *shape.size, generator=g)
        dy = torch.randn(shape.images, shape.outputs, shape.outputs_of(0), shape.outputs_of(1), generator=g)
        self.x = channels_last((x.relu_() if positive else x).to(dtype))
        self.dy = channels_last(dy.to(dtype))

    def found(self, tile: int) -> Tensor:
        return conv_dweight(self.dy, self.x, *self.shape.windows, tile)

    def eager(self, dtype: torch.dtype = torch.float64) -> Tensor:
        weight = torch.empty(self.shape.outputs, self.shape.inputs, *self.shape.kernel, dtype=dtype)
        _, stride, padding, dilation = self.shape.windows
        _, dweight, _ = torch.ops.aten.convolution_backward(
            self.dy.to(dtype), self.x.to(dtype), weight, None, stride, padding, dilation, False, (0, 0), 1,
            (False, True, False),
        )  # fmt: skip
        return dweight


@pytest.mark.parametrize(
    "shape, tile, dtype",
    [(*form, torch.bfloat16) for form in FORMS] + [(shape, 1, torch.float32) for shape in DIRECT],
    ids=repr,
)
def test_it_is_the_formula_in_fp64(shape, tile, dtype):
    case = Case(shape, dtype=dtype)
    found, exact = case.found(tile), case.eager()
    assert found.dtype == torch.float32 and found.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(found, exact) <= MOST_ERROR[tile]
    assert (found - exact).abs().amax() <= 20 * MOST_ERROR[tile] * exact.abs().amax()


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize(
    "shape, tile",
    [
        (Shape(64, 64, size=(28, 28), images=4), 7),
        (Shape(64, 64, size=(28, 28), images=4), 1),
        (Shape(256, 32, size=(7, 7), images=16), 7),
        (Shape(64, 128, size=(28, 28), stride=(2, 2), images=4), 1),
        (Shape(64, 256, (1, 1), (56, 56), padding=(0, 0)), 1),
        (Shape(3, 64, (7, 7), (112, 112), stride=(2, 2), padding=(3, 3)), 1),
    ],
    ids=repr,
)
def test_errors_are_far_below_those_of_eager_which_rounds_to_bfloat16(shape, tile, positive):
    case = Case(shape, positive)
    exact = case.eager()
    assert relative_error(case.found(tile), exact) <= relative_error(case.eager(torch.bfloat16), exact) / 50


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        Shape(64, 128, size=(28, 28), stride=(2, 2), images=4),
        Shape(64, 256, (1, 1), (56, 56), padding=(0, 0)),
        Shape(512, 64, (1, 1), (7, 7), padding=(0, 0), images=16),
    ],
    ids=repr,
)
def test_errors_in_float32_are_not_above_those_of_eager(shape, positive):
    case = Case(shape, positive, torch.float32)
    exact = case.eager()
    assert relative_error(case.found(1), exact) <= 1.1 * relative_error(case.eager(torch.float32), exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_is_the_same_bits_whatever_the_threads(dtype):
    threads = torch.get_num_threads()
    direct = DIRECT[-1], DIRECT[-2], DIRECT[-3], DIRECT[6]
    cases = [(Case(shape, dtype=dtype), 1) for shape in direct]
    cases += [(Case(shape), tile) for shape in WINOGRAD[-3::2] for tile in (2, 4, 7)]
    first = [case.found(tile) for case, tile in cases]
    try:
        for count in (1, 2, 3, 1, 2, 3):
            torch.set_num_threads(count)
            for (case, tile), expected in zip(cases, first, strict=True):
                assert torch.equal(case.found(tile), expected), count
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("shape, operand, value", NOT_FINITE, ids=repr)
def test_values_that_are_not_finite_stay_where_eager_has_them(shape, operand, value):
    for row, column in ((0, 0), (1, 1), (-1, -1)):
        case = Case(shape)
        getattr(case, operand)[0, 1, row, column] = value
        found, eager, exact = case.found(1), case.eager(torch.float32), case.eager()
        assert torch.equal(found.isnan(), eager.isnan())
        assert torch.equal(found.isinf(), eager.isinf())
        finite = eager.isfinite()
        assert relative_error(found[finite], exact[finite]) <= MOST_ERROR[1]


def test_winograds_form_says_that_a_sum_is_not_finite():
    case = Case(WINOGRAD[0])
    case.dy[0, 1, 3, 3] = float("inf")
    for tile in (2, 4, 7):
        found = case.found(tile)
        assert found.dtype == torch.float32 and found.shape == (0,)


@pytest.mark.parametrize("tile", [1, 2, 4, 7])
def test_without_images_it_is_zero(tile):
    shape = Shape(8, 5, images=0)
    found = Case(shape).found(tile)
    assert torch.equal(found, torch.zeros(5, 8, 3, 3)) and found.dtype == torch.float32


def test_what_the_kernels_cant_read_is_refused():
    shape = WINOGRAD[0]
    case, wide = Case(shape), Case(shape)
    wide.x, wide.dy = wide.x.float(), wide.dy.float()
    for x in (case.x.contiguous(), case.x.double(), case.x.float()):
        for given in ((case.dy, x), (x, case.x)):
            with pytest.raises(RuntimeError, match="channels_last, both float32 or both bfloat16"):
                conv_dweight(*given, *shape.windows, 4)
    for x, windows in (
        (case.x[:1], shape.windows),
        (case.x, replace(shape, padding=(1, 0)).windows),
        (case.x, replace(shape, kernel=(3, 2)).windows),
        (case.x, replace(shape, stride=(2, 1)).windows),
        (case.x, replace(shape, dilation=(1, 2)).windows),
    ):
        with pytest.raises(RuntimeError, match="dy doesn't belong to this convolution of x"):
            conv_dweight(case.dy, x, *windows, 1)
    for other in (replace(shape, kernel=(3, 1)), replace(shape, stride=(1, 2)), replace(shape, dilation=(2, 1))):
        with pytest.raises(RuntimeError, match="tiles are for 3x3 windows of stride and dilation 1"):
            conv_dweight(case.dy, case.x, *other.windows, 2)
    for given, tile in ((case, 3), (case, 0), (wide, 7)):
        with pytest.raises(RuntimeError, match=f"the tile must be 1, 2, 4 or, in bfloat16, 7; got {tile}"):
            given.found(tile)


def test_opcheck_without_exemptions():
    for shape, tile in ((Shape(8, 20, size=(9, 7)), 4), (Shape(8, 20, (1, 1), padding=(0, 0)), 1)):
        case = Case(shape)
        for x, dy in ((case.x, case.dy), (case.x.float(), case.dy.float())):
            torch.library.opcheck(torch.ops.fusedres_native.conv_dweight.default, (dy, x, *shape.windows, tile))

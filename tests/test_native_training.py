"""The compiled convolutions of a training step against fp64; test_native_backend.py has every instruction set."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from training_steps import channels_last, relative_error

import fusedres
from fusedres import dispatch
from fusedres.backends import Geometry, Request, native, native_training, reference
from fusedres.backends.native_training import Tiles

pytestmark = pytest.mark.usefixtures("native")


def operators():
    return torch.ops.fusedres_native


def windows(padding: tuple[int, int] = (1, 1)) -> tuple[tuple[int, int], ...]:
    """The operators' arguments for windows next to each other."""
    return (1, 1), padding, (1, 1)


@dataclass(frozen=True)
class Shape:
    inputs: int
    outputs: int
    size: tuple[int, int]
    images: int = 2
    padding: tuple[int, int] = (1, 1)

    @property
    def geometry(self) -> Geometry:
        return Geometry(padding=self.padding)


# Channels and sizes that fill neither vectors nor panels nor tiles, one step and several chunks of them.
ODD = (
    Shape(16, 32, (8, 8)),
    Shape(33, 47, (7, 10), 3),
    Shape(3, 5, (3, 4), 1),
    Shape(1, 1, (1, 1), 1),
    Shape(70, 20, (5, 9), padding=(2, 0)),
    Shape(8, 8, (6, 6), 0),
    Shape(17, 64, (25, 27), 1, (0, 2)),
    Shape(40, 24, (57, 41), 3),
    Shape(600, 30, (6, 6), 8),
)
# As many weights as are transformed block by block, in chunks of inputs.
MANY = Shape(300, 230, (9, 8))
# Those that dispatch gives to the kernels.
SERVED = (Shape(32, 32, (16, 16), 4), Shape(64, 48, (14, 13), 8), Shape(33, 70, (28, 20), 3, (0, 1)))


class Case:
    """Random operands of one shape, with eager's gradients in any dtype."""

    def __init__(self, shape: Shape, positive: bool = False) -> None:
        g = torch.Generator().manual_seed(0)
        self.shape, self.geometry = shape, shape.geometry
        self.x = channels_last(torch.randn(shape.images, shape.inputs, *shape.size, generator=g))
        if positive:
            self.x.relu_()
        self.weight = torch.randn(shape.outputs, shape.inputs, 3, 3, generator=g) / (9 * shape.inputs) ** 0.5
        self.bias = torch.randn(shape.outputs, generator=g)
        rows, columns = self.geometry.output_size((3, 3), *shape.size)
        self.dy = channels_last(torch.randn(shape.images, shape.outputs, rows, columns, generator=g))
        self.residual = channels_last(torch.randn(self.x.shape, generator=g))

    def forward(self, dtype: torch.dtype = torch.float64) -> Tensor:
        return reference.conv_forward(self.x.to(dtype), self.weight.to(dtype), self.bias.to(dtype), self.geometry)

    def backward(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        operands = (t.to(dtype) for t in (self.dy, self.x, self.weight))
        found = reference.conv_backward(*operands, self.geometry, (True, True, True), None, False)
        assert all(t is not None for t in found)
        return found  # pyright: ignore[reportReturnType]

    def chosen(self, tiles: Tiles | None) -> tuple[Tiles, Tiles]:
        return native_training.choices_for(request(self.shape)) if tiles is None else (tiles, tiles)

    def y(self, tiles: Tiles | None = None) -> Tensor:
        return native_training.forward(self.x, self.weight, self.bias, self.geometry, *self.chosen(tiles))

    def found(
        self, *wanted: bool, residual: Tensor | None = None, in_place: bool = False, tiles: Tiles | None = None
    ) -> tuple[Tensor | None, ...]:
        operands = self.dy, self.x, self.weight, self.geometry
        return native_training.backward(*operands, wanted, residual, in_place, *self.chosen(tiles))

    def dweight(self, tile: int) -> Tensor:
        return operators().conv_dweight(self.dy, self.x, (3, 3), *self.geometry[:3], tile)


# The kernels


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("shape", ODD + SERVED, ids=repr)
def test_dweight_is_the_formula_in_fp64(shape, tile):
    case = Case(shape)
    found, exact = case.dweight(tile), case.backward()[1]
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(found, exact) <= 1e-6 or (torch.equal(found, torch.zeros_like(found)) and not shape.images)
    assert (found - exact).abs().amax() <= 2e-5 * exact.abs().amax()


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("shape", [*ODD, *SERVED, Shape(512, 300, (4, 3), 1)], ids=repr)
def test_y_and_dx_are_the_formula_in_fp64(shape, tile):
    case = Case(shape)
    outputs, inputs = case.weight.shape[:2]
    strided = torch.randn(3, inputs, 2 * outputs, 6).permute(2, 1, 0, 3)[::2, :, :, ::2].copy_(case.weight)
    turned = tuple(2 - pad for pad in shape.padding)
    exact, exact_dx = case.forward(), case.backward()[0]
    for weight in (case.weight, channels_last(case.weight), strided):
        y = operators().conv(case.x, weight, case.bias, None, *windows(shape.padding), tile, False)
        dx = operators().conv(case.dy, weight, None, case.residual, *windows(turned), tile, True)
        in_place = case.residual.clone()
        operators().conv_(case.dy, weight, in_place, *windows(turned), tile, True)
        assert torch.equal(in_place, dx)
        for found, expected in ((y, exact), (dx, exact_dx + case.residual)):
            assert found.shape == expected.shape and found.is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("shape", [*SERVED, Shape(64, 64, (28, 28), 4), Shape(512, 64, (7, 7), 16)], ids=repr)
def test_errors_are_at_most_four_times_eagers(shape, positive):
    case = Case(shape, positive)
    exact = (case.forward(), *case.backward()[:2])
    eager = (case.forward(torch.float32), *case.backward(torch.float32)[:2])
    found = case.y(), *case.found(True, True, False)[:2]
    for name, one, other, truth in zip(("y", "dx", "dweight"), found, eager, exact, strict=True):
        assert relative_error(one, truth) <= 4 * relative_error(other, truth), name


def test_gradients_are_the_same_bits_whatever_the_threads():
    threads = torch.get_num_threads()
    cases = [(Case(Shape(48, 80, (30, 29))), tile) for tile in (2, 4)] + [(Case(ODD[-2]), 4), (Case(MANY), 4)]
    first = [case.dweight(tile) for case, tile in cases]
    dx = [operators().conv(case.dy, case.weight, None, None, *windows(), tile, True) for case, tile in cases]
    try:
        for count in (1, 2, 3, 1, 2, 3):
            torch.set_num_threads(count)
            for (case, tile), dweight, gradient in zip(cases, first, dx, strict=True):
                assert torch.equal(case.dweight(tile), dweight), count
                again = operators().conv(case.dy, case.weight, None, None, *windows(), tile, True)
                assert torch.equal(again, gradient), count
    finally:
        torch.set_num_threads(threads)


def test_what_the_kernels_cant_read_is_refused():
    case = Case(SERVED[0])
    convolve, convolve_ = operators().conv, operators().conv_
    half, contiguous = case.x.half(), case.x.contiguous()
    for x, reason in (
        (contiguous, "x must be in channels_last"),
        (case.x.double(), "x must be float32 or bfloat16"),
        (half, "x must be float32 or bfloat16"),
    ):
        with pytest.raises(RuntimeError, match=reason):
            convolve(x, case.weight, None, None, *windows(), 4, False)
    for residual in (contiguous, half):
        for call in (
            lambda r=residual: convolve(case.x, case.weight, None, r, *windows(), 4, False),
            lambda r=residual: convolve_(case.x, case.weight, r, *windows(), 4, False),
        ):
            with pytest.raises(RuntimeError, match="the residual must be in channels_last and have x's dtype"):
                call()
    with pytest.raises(RuntimeError, match="the bias must be float32"):
        convolve(case.x, case.weight, case.bias.double(), None, *windows(), 4, False)
    strided = (2, 2), (1, 1), (1, 1)
    for weight, places, tile in (
        (case.weight, windows(), 3),
        (case.weight, windows(), 7),
        (case.weight, strided, 4),
        (case.weight[..., :1], windows(), 4),
    ):
        with pytest.raises(RuntimeError, match=f"these windows have no tile of {tile}"):
            convolve(case.x, weight, None, None, *places, tile, False)
    for weight in (case.weight[0], case.weight.bfloat16()):
        with pytest.raises(RuntimeError, match="the weight must be float32 or have x's dtype, and four dimensions"):
            convolve(case.x, weight, None, None, *windows(), 1, False)
    with pytest.raises(RuntimeError, match="x has 32 channels, and the weight is for 16"):
        convolve(case.x, case.weight[:, :16], None, None, *windows(), 4, False)


def test_opcheck_without_exemptions():
    case = Case(Shape(8, 20, (9, 7)))
    given = case.dy, case.weight, None, case.residual, *windows(), 4, True
    torch.library.opcheck(operators().conv.default, given)
    torch.library.opcheck(operators().conv_.default, (*given[:2], *given[3:]))
    torch.library.opcheck(operators().conv.default, (case.x, case.weight, case.bias, None, *windows(), 2, False))
    strided = (2, 1), (0, 2), (1, 2)
    torch.library.opcheck(operators().conv.default, (case.x, case.weight, None, None, *strided, 1, False))


# The pair that a segment calls


@pytest.mark.parametrize("shape", SERVED, ids=repr)
def test_every_subset_of_gradients(shape):
    case = Case(shape)
    exact = case.backward()
    for wanted in itertools.product((False, True), repeat=3):
        for found, expected, asked in zip(case.found(*wanted), exact, wanted, strict=True):
            assert (found is not None) == asked
            if found is not None:
                assert relative_error(found, expected) <= 3e-6


@pytest.mark.parametrize("in_place", [False, True])
def test_a_residual_is_added_to_dx(in_place):
    case = Case(SERVED[0])
    before = case.residual.clone()
    dx, *_ = case.found(True, False, False, residual=case.residual, in_place=in_place)
    assert dx is not None
    assert relative_error(dx, case.backward()[0] + before) <= 3e-6
    assert (dx is case.residual) if in_place else torch.equal(case.residual, before)


@pytest.mark.parametrize("residual", [False, True])
def test_gradients_in_other_layouts_are_atens(residual):
    case = Case(SERVED[0])
    case.dy = case.dy.contiguous()
    added = case.residual if residual else None
    dx, dweight, dbias = case.found(True, True, True, residual=added, in_place=False)
    expected = case.backward(torch.float32)
    assert torch.equal(dweight, expected[1]) and torch.equal(dbias, expected[2])
    assert torch.equal(dx, expected[0] + case.residual if residual else expected[0])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("operand", ["x", "dy"])
@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("shape", [SERVED[0], MANY], ids=repr)
def test_values_that_are_not_finite_stay_where_eager_has_them(shape, tile, operand, value):
    tiles = Tiles(tile, tile, tile)
    for row, column in ((0, 0), (5, 4), (-1, -1)):
        case = Case(shape)
        getattr(case, operand)[0, 1, row, column] = value
        y = case.y(tiles)
        dx, dweight, _ = case.found(True, True, False, tiles=tiles)
        eager, eager_dweight, _ = case.backward(torch.float32)
        for found, theirs, exact in ((y, case.forward(torch.float32), case.forward()), (dx, eager, case.backward()[0])):
            assert torch.equal(found.isfinite(), theirs.isfinite())
            assert torch.equal(found.isnan(), theirs.isnan())
            if not math.isfinite(value):  # the others of its tile are as accurate as ever
                finite = theirs.isfinite()
                one, other, truth = (t[finite] for t in (found, theirs, exact))
                assert relative_error(one, truth) <= 4 * relative_error(other, truth)
                assert (one - truth).abs().amax() <= 4 * (other - truth).abs().amax()
        if dweight.isfinite().all():  # Winograd's tiles did not overflow
            assert eager_dweight.isfinite().all()
        else:
            assert torch.equal(dweight.nan_to_num(), eager_dweight.nan_to_num())


# Who is asked


def request(shape: Shape, **changes: object) -> Request:
    made = Request(
        "conv",
        "cpu",
        torch.float32,
        "channels_last",
        "identity",
        parameter_dtype=torch.float32,
        wants_gradient=True,
        sizes=(shape.images, shape.inputs, *shape.size),
        weight_sizes=(shape.outputs, shape.inputs, 3, 3),
        geometry=shape.geometry,
    )
    return made._replace(**changes)


def test_the_kernels_are_asked_where_they_save_work(monkeypatch):
    for shape in SERVED:
        assert dispatch.convolving(request(shape)).backend is native.BACKEND
    shape = Shape(64, 64, (56, 56), 8)
    refused = {
        "torch.float16": {"dtype": torch.float16},
        "one group": {"geometry": Geometry(padding=(1, 1), groups=2)},
        "contiguous in memory": {"layout": "contiguous"},
        "torch.compile": {"compiling": True},
        "or 8, and a group here has 2": {"group": (4, 2)},
        "for cuda tensors": {"device": "cuda"},
    }
    elsewhere = (
        {"geometry": Geometry((2, 2), (1, 1))},
        {"geometry": Geometry(padding=(2, 2), dilation=(2, 2))},
        {"weight_sizes": (64, 64, 1, 1), "geometry": Geometry()},
    )
    for reason, changes in refused.items():
        assert reason in (native.objection(request(shape, **changes)) or "")
    for changes in elsewhere:
        asked = request(shape, **changes)
        assert native_training.tiles(asked.sizes, asked.weight_sizes, asked.geometry) == (0, 0, 1), changes
    beyond = request(shape, geometry=Geometry(padding=(3, 1)))
    assert native_training.tiles(beyond.sizes, beyond.weight_sizes, beyond.geometry) == (4, 0, 4)
    few = request(shape, sizes=(8, 3, 56, 56), weight_sizes=(64, 3, 3, 3))
    assert "aten is as fast" in (native.objection(few) or "")
    assert dispatch.convolving(few).backend is reference.BACKEND
    asked = request(shape)
    monkeypatch.setenv("FUSEDRES_WINOGRAD", "0")
    assert native_training.tiles(asked.sizes, asked.weight_sizes, asked.geometry) == (0, 0, 1)


def test_a_forced_backend_without_convolutions_leaves_them_to_aten():
    served = request(SERVED[0])
    for name, expected in (("native", native.BACKEND), ("triton", reference.BACKEND), ("reference", reference.BACKEND)):
        with fusedres.use_backend(name):
            assert dispatch.convolving(served).backend is expected
    with fusedres.use_backend("native"):
        assert dispatch.convolving(served._replace(dtype=torch.float16)).backend is reference.BACKEND

"""The compiled convolutions of a training step in bfloat16; test_native_backend.py has every instruction set."""

from __future__ import annotations

import copy
from typing import NamedTuple

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from eager import pair, sample
from test_native_convolution import BOTH
from test_native_dweight import MOST_ERROR
from test_native_training import operators
from test_native_windows import CHANNELS, any_windows, whatever_it_thinks_of
from training_steps import channels_last, relative_error

from fusedres import dispatch
from fusedres.backends import Geometry, Request, native, native_training, reference

pytestmark = pytest.mark.usefixtures("native")

BF16 = torch.bfloat16


class Shape(NamedTuple):
    inputs: int
    outputs: int
    kernel: tuple[int, int]
    size: tuple[int, int]
    images: int = 2
    geometry: Geometry = Geometry()
    tile: int = 1


# Channels and pixels that fill neither vectors nor pairs nor blocks, and windows of every kind.
DIRECT = (
    Shape(16, 32, (1, 1), (5, 7)),
    Shape(33, 47, (1, 1), (3, 3), 3),
    Shape(1, 1, (1, 1), (1, 1), 1),
    Shape(64, 70, (1, 1), (9, 6), 2, Geometry((2, 2))),
    Shape(33, 20, (1, 1), (7, 10), 3, Geometry((3, 2))),
    Shape(17, 24, (3, 3), (11, 9), 2, Geometry((2, 2), (1, 1))),
    Shape(40, 19, (3, 3), (8, 8), 2, Geometry((1, 1), (1, 1))),
    Shape(20, 21, (3, 2), (9, 8), 2, Geometry((1, 1), (2, 0), (2, 3))),
    Shape(3, 64, (7, 7), (20, 19), 2, Geometry((2, 2), (3, 3))),
    Shape(5, 33, (1, 5), (6, 9), 1, Geometry((1, 1), (0, 2))),
)
TILED = [
    Shape(*channels, (3, 3), size, images, Geometry(padding=padding), tile)
    for tile in (2, 4, 7)
    for channels, size, images, padding in (
        ((16, 32), (14, 14), 2, (1, 1)),
        ((33, 47), (9, 8), 3, (0, 2)),
        ((70, 17), (15, 29), 1, (2, 1)),
        ((301, 230), (9, 8), 2, (1, 1)),  # too many weights to pack at once
    )
]

SEVERAL_TILES = Shape(24, 48, (3, 3), (41, 40), 3, Geometry((2, 2), (1, 1)))
# Taps that some pixels of x are not seen by, or any; windows far beyond the border; fewer rows than a step.
STRIDED = (
    *(shape for shape in DIRECT if shape.geometry.stride != (1, 1)),
    SEVERAL_TILES,
    Shape(17, 40, (2, 5), (7, 12), 3, Geometry((3, 2), (1, 2))),
    Shape(33, 18, (3, 4), (13, 11), 2, Geometry((2, 3), (3, 0), (3, 2))),
    Shape(47, 16, (3, 3), (9, 10), 2, Geometry((4, 2), (1, 5), (2, 2))),
    Shape(20, 33, (3, 3), (1, 2), 2, Geometry((2, 3), (1, 1))),
    Shape(21, 37, (1, 2), (7, 10), 2, Geometry((2, 2), (2, 3))),
)


class Case:
    """Random operands of one shape, and what fp64 makes of them."""

    def __init__(self, shape: Shape) -> None:
        g = torch.Generator().manual_seed(0)
        self.shape = shape
        self.x = channels_last(torch.randn(shape.images, shape.inputs, *shape.size, generator=g).to(BF16))
        weight = torch.randn(shape.outputs, shape.inputs, *shape.kernel, generator=g)
        self.weight = (weight / (weight[0].numel()) ** 0.5).to(BF16)
        self.bias = torch.randn(shape.outputs, generator=g)
        sizes = shape.geometry.output_size(shape.kernel, *shape.size)
        self.dy = channels_last(torch.randn(shape.images, shape.outputs, *sizes, generator=g).to(BF16))
        self.residual = channels_last(torch.randn(self.x.shape, generator=g).to(BF16))

    @property
    def windows(self) -> tuple[tuple[int, int], ...]:
        return self.shape.geometry[:3]

    @property
    def turned(self) -> tuple[tuple[int, int], ...]:
        """The windows that take dy to dx."""
        stride, padding, dilation = self.windows
        rows, columns = (d * (k - 1) - p for k, p, d in zip(self.shape.kernel, padding, dilation, strict=True))
        return stride, (rows, columns), dilation

    def layouts(self, dtype: torch.dtype = BF16):
        """The weight as users have it, and with gaps between its values."""
        weight = self.weight.to(dtype)
        outputs, inputs, *kernel = weight.shape
        gaps = torch.zeros(kernel[0], inputs, 2 * outputs, 2 * kernel[1], dtype=dtype)
        yield from (weight, channels_last(weight), gaps.permute(2, 1, 0, 3)[::2, ..., ::2].copy_(weight))

    def y(self, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        x, weight, bias = (t.to(dtype) for t in (self.x, self.weight, self.bias))
        return reference.conv_forward(x, weight, bias, self.shape.geometry)

    def dx(self, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        dy, x, weight = (t.to(dtype) for t in (self.dy, self.x, self.weight))
        dx, _, _ = reference.conv_backward(dy, x, weight, self.shape.geometry, (True, False, False), None, False)
        assert dx is not None
        return dx

    def dweight(self) -> torch.Tensor:
        dy, x, weight = (t.double() for t in (self.dy, self.x, self.weight))
        _, dweight, _ = reference.conv_backward(dy, x, weight, self.shape.geometry, (False, True, False), None, False)
        assert dweight is not None
        return dweight


@pytest.mark.parametrize("shape", [*DIRECT, *TILED], ids=repr)
def test_y_is_inferences(shape):
    case, inference = Case(shape), operators()
    packed = inference.conv_act_pack(case.weight, 1, shape.tile)
    expected = inference.conv_act(case.x, packed, case.bias, None, None, *case.windows, 1, 0)
    for weight in case.layouts():
        y = operators().conv(case.x, weight, case.bias, None, *case.windows, shape.tile, False)
        assert y.is_contiguous(memory_format=torch.channels_last)
        if shape.tile == 1:
            assert torch.equal(y, expected)
        assert relative_error(y, case.y()) <= 1.1 * relative_error(case.y(BF16), case.y()), "eager's"


@pytest.mark.parametrize("shape", [s for s in (*DIRECT, *TILED) if s.geometry.stride == (1, 1)], ids=repr)
def test_dx_is_the_formula_in_fp64(shape):
    case = Case(shape)
    exact = case.dx()
    for weight in case.layouts():
        dx = operators().conv(case.dy, weight, None, None, *case.turned, shape.tile, True)
        assert relative_error(dx, exact) <= 1.1 * relative_error(case.dx(BF16), exact), "eager's"
        joined = operators().conv(case.dy, weight, None, case.residual, *case.turned, shape.tile, True)
        in_place = case.residual.clone()
        operators().conv_(case.dy, weight, in_place, *case.turned, shape.tile, True)
        assert torch.equal(in_place, joined)
        added = exact + case.residual
        assert relative_error(joined, added) <= 1.1 * relative_error(added.to(BF16), added)


def assert_are_the_formula(case: Case, found: dict[str, torch.Tensor], bar: dict[str, float]) -> None:
    exact = {"y": case.y(), "dx": case.dx(), "dweight": case.dweight()}
    for name, value in found.items():
        assert value.shape == exact[name].shape and value.isfinite().all(), name
        assert (value - exact[name]).norm() <= bar[name] * exact[name].norm(), name


@whatever_it_thinks_of
@hypothesis.given(any_windows(), CHANNELS, CHANNELS, st.integers(1, 3), st.sampled_from(BOTH))
def test_any_channels_and_any_windows_are_the_formula_in_fp64(windows, inputs, outputs, images, dtype):
    kernel, size, *rest = windows
    case = Case(Shape(inputs, outputs, kernel, size, images, Geometry(*rest)))
    x, dy, weight = (t.to(dtype) for t in (case.x, case.dy, case.weight))
    found = {"y": operators().conv(x, weight, case.bias, None, *case.windows, 1, False)}
    if rest[0] == (1, 1) and min(case.turned[1]) >= 0:
        found["dx"] = operators().conv(dy, weight, None, None, *case.turned, 1, True)
    else:
        found["dx"] = operators().conv_dx(dy, weight, None, size, *case.windows)
    found["dweight"] = operators().conv_dweight(dy, x, kernel, *case.windows, 1)
    rounding = 2**-8 if dtype is BF16 else 1e-6
    assert_are_the_formula(case, found, {"y": rounding, "dx": rounding, "dweight": 1e-6})


@whatever_it_thinks_of
@hypothesis.given(
    st.tuples(*[st.integers(3, 33)] * 2),
    st.tuples(*[st.integers(0, 2)] * 2),
    CHANNELS,
    CHANNELS,
    st.integers(1, 3),
    st.sampled_from([(2, torch.float32), (4, torch.float32), (2, BF16), (4, BF16), (7, BF16)]),
)
def test_winograds_form_of_any_size_is_the_formula_in_fp64(size, padding, inputs, outputs, images, form):
    tile, dtype = form
    case = Case(Shape(inputs, outputs, (3, 3), size, images, Geometry(padding=padding)))
    x, dy, weight = (t.to(dtype) for t in (case.x, case.dy, case.weight))
    found = {
        "y": operators().conv(x, weight, case.bias, None, *case.windows, tile, False),
        "dx": operators().conv(dy, weight, None, None, *case.turned, tile, True),
        "dweight": operators().conv_dweight(dy, x, (3, 3), *case.windows, tile),
    }
    most = 2**-7 if dtype is BF16 else 2e-6
    assert_are_the_formula(case, found, {"y": most, "dx": most, "dweight": MOST_ERROR[tile]})


@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize("shape", STRIDED, ids=repr)
def test_dx_of_strided_windows_is_the_formula_in_fp64(shape, dtype):
    case = Case(shape)
    exact, dy, residual = case.dx(), case.dy.to(dtype), case.residual.to(dtype)
    added, most = exact + residual, 1.1 if dtype is BF16 else 4  # float32 sums are in another order
    for weight in (*case.layouts(dtype), case.weight.float()):
        dx = operators().conv_dx(dy, weight, None, shape.size, *case.windows)
        assert dx.is_contiguous(memory_format=torch.channels_last)
        assert relative_error(dx, exact) <= most * relative_error(case.dx(dtype), exact), "eager's"
        joined = operators().conv_dx(dy, weight, residual, shape.size, *case.windows)
        in_place = residual.clone()
        operators().conv_dx_(dy, weight, in_place, *case.windows)
        assert torch.equal(in_place, joined)
        assert relative_error(joined, added) <= most * relative_error(case.dx(dtype) + residual, added)


def test_dx_of_strided_windows_is_the_same_bits_whatever_the_threads():
    case, threads = Case(SEVERAL_TILES), torch.get_num_threads()
    given = case.dy, case.weight, case.residual, case.shape.size, *case.windows
    expected = operators().conv_dx(*given)
    try:
        for count in (2, 3, 7):
            torch.set_num_threads(count)
            assert torch.equal(operators().conv_dx(*given), expected), count
    finally:
        torch.set_num_threads(threads)


def test_what_conv_dx_cant_read_is_refused():
    case = Case(STRIDED[1])
    convolve, size = operators().conv_dx, case.shape.size
    with pytest.raises(RuntimeError, match="these windows make 2 x 5 pixels of dx's, and dy has 3 x 5"):
        convolve(case.dy, case.weight, None, (size[0] - 2, size[1]), *case.windows)
    with pytest.raises(RuntimeError, match="x must be in channels_last"):
        convolve(case.dy.contiguous(), case.weight, None, size, *case.windows)
    with pytest.raises(RuntimeError, match="the residual must be in channels_last and have x's dtype"):
        convolve(case.dy, case.weight, case.residual.float(), size, *case.windows)
    with pytest.raises(RuntimeError, match="the residual must have the result's sizes"):
        convolve(case.dy, case.weight, channels_last(case.residual[:, :, 1:]), size, *case.windows)
    with pytest.raises(RuntimeError, match="x has 20 channels, and the weight is for 19"):
        convolve(case.dy, case.weight[:19], None, size, *case.windows)


def test_opcheck_of_conv_dx_without_exemptions():
    case = Case(STRIDED[1])
    given = case.dy, case.weight, case.residual, case.shape.size, *case.windows
    torch.library.opcheck(operators().conv_dx.default, given)
    torch.library.opcheck(operators().conv_dx_.default, (*given[:3], *case.windows))
    torch.library.opcheck(operators().conv_dx.default, (*given[:2], None, *given[3:]))


@pytest.mark.parametrize("shape", [*DIRECT, *TILED], ids=repr)
def test_a_float32_weight_is_rounded_as_it_is_read(shape):
    case = Case(shape)
    # Ties to even in both directions, a carry into the exponent, what overflows, and what is small.
    special = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 2 - 2**-9, 3.4e38, -3.4e38, 1e-39, -0.0])
    g = torch.Generator().manual_seed(1)
    case.weight = torch.randn(case.weight.shape, generator=g)
    case.weight.view(-1)[: special.numel()] = special[: case.weight.numel()]
    calls = [(case.x, case.windows, False), (case.dy, case.turned, True)]
    for weight in case.layouts(torch.float32):
        for operand, windows, transposed in calls[: 2 if shape.geometry.stride == (1, 1) else 1]:
            found, expected = (
                operators().conv(operand, w, None, None, *windows, shape.tile, transposed)
                for w in (weight, weight.to(BF16))
            )
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [s for s in (*DIRECT, *TILED) if s.tile in (1, 7)], ids=repr)
@pytest.mark.parametrize("in_place", [False, True])
def test_the_pair_that_a_segment_calls(shape, in_place):
    case, geometry, chosen = Case(shape), shape.geometry, native_training.choices_for(request(shape))
    y = native_training.forward(case.x, case.weight, case.bias.to(BF16), geometry, *chosen)
    assert relative_error(y, case.y()) <= 1.1 * relative_error(case.y(BF16), case.y())
    before = case.residual.clone()
    operands = case.dy, case.x, case.weight, geometry
    dx, dweight, dbias = native_training.backward(*operands, (True, True, True), case.residual, in_place, *chosen)
    _, *expected = reference.conv_backward(*(t.double() for t in operands[:3]), geometry, (True,) * 3, None, False)
    _, *eager = reference.conv_backward(*operands, (True,) * 3, None, False)
    added = case.dx() + before
    assert relative_error(dx, added) <= 1.1 * relative_error(case.dx(BF16) + before, added)
    assert (dx is case.residual) or torch.equal(case.residual, before)
    for found, theirs, exact in zip((dweight, dbias), eager, expected, strict=True):
        assert found.dtype in (BF16, torch.float32)
        assert relative_error(found, exact) <= 1.1 * relative_error(theirs, exact)


def request(shape: Shape, **changes: object) -> Request:
    made = Request(
        "conv",
        "cpu",
        BF16,
        "channels_last",
        "identity",
        parameter_dtype=BF16,
        wants_gradient=True,
        sizes=(shape.images, shape.inputs, *shape.size),
        weight_sizes=(shape.outputs, shape.inputs, *shape.kernel),
        geometry=shape.geometry,
    )
    return made._replace(**changes)


def test_the_kernels_have_every_window_of_one_group():
    for shape in DIRECT:
        assert dispatch.convolving(request(shape)).backend is native.BACKEND
    grouped = request(DIRECT[0], geometry=Geometry(groups=2))
    assert "one group" in (native.objection(grouped) or "")
    assert "contiguous in memory" in (native.objection(request(DIRECT[0], layout="contiguous")) or "")


def test_the_tile_units_gradient_of_weights_is_atens(monkeypatch):
    arguments = (16, 64, 56, 56), (64, 64, 3, 3), Geometry(padding=(1, 1)), BF16
    for name, tile in (("avx512_bf16", 7), ("amx", 0)):
        monkeypatch.setattr(native_training, "instruction_set", lambda dtype, name=name: name)
        assert native_training.tiles(*arguments).of_dweight == tile


@pytest.mark.parametrize("build", [("BasicBlock", 32, 40), ("Bottleneck", 64, 32)], ids=str)
def test_blocks_under_autocast_are_as_accurate_as_eager(build):
    fused, eager = pair(*build, dtype=torch.float32)
    x = channels_last(sample(4, fused.conv1.in_channels, 16, 16, dtype=torch.float32))
    found = []
    for block, dtype in ((fused, BF16), (eager, BF16), (copy.deepcopy(eager).double(), None)):
        leaf = x.to(block.conv1.weight.dtype, copy=True).requires_grad_()
        with torch.autocast("cpu", BF16, enabled=dtype is BF16):
            y = block.to(memory_format=torch.channels_last)(leaf)
        g = torch.Generator().manual_seed(1)
        y.backward(channels_last(torch.randn(y.shape, generator=g).to(y.dtype)))
        parameters = {name: p.grad for name, p in block.named_parameters()}
        assert all(p.grad.dtype == p.dtype for p in block.parameters())
        found.append({"y": y.detach(), "dx": leaf.grad} | parameters)
    for name, exact in found[2].items():
        assert relative_error(found[0][name], exact) <= 1.1 * relative_error(found[1][name], exact), name

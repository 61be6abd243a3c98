"""The compiled convolutions against the same formula in fp64; every instruction set by test_native_backend.py."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fusedres.backends import Filter, Geometry, native_convolution
from fusedres.epilogue import CATALOGUE

pytestmark = pytest.mark.usefixtures("native")


def operators():
    return torch.ops.fusedres_native


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Shape:
    inputs: int
    outputs: int
    kernel: tuple[int, int] = (3, 3)
    size: tuple[int, int] = (9, 9)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    images: int = 2
    tile: int = 1


BOTH = (torch.float32, torch.bfloat16)
in_both_dtypes = pytest.mark.parametrize("dtype", BOTH, ids=str)


# several groups in a vector, whose number is no whole number of vectors
BUNDLES = (
    Shape(24, 24, groups=3, size=(11, 8)),
    Shape(40, 40, groups=20, size=(9, 10), stride=(2, 2)),
    Shape(256, 256, groups=32, size=(10, 9), stride=(1, 2), images=1),
    Shape(20, 20, (1, 1), (5, 7), padding=(0, 0), groups=5, images=3),
    Shape(36, 36, (3, 5), (9, 6), padding=(2, 2), dilation=(2, 1), groups=9),
)
DIRECT = (
    Shape(16, 32),
    Shape(64, 64, size=(14, 14), images=1),
    Shape(33, 47, size=(7, 10), images=3),
    Shape(5, 1, size=(8, 6)),
    Shape(32, 16, (1, 1), (7, 7), padding=(0, 0)),
    Shape(1024, 40, (1, 1), (5, 7), padding=(0, 0), images=3),
    Shape(512, 24, (1, 1), (9, 8), stride=(2, 2), padding=(0, 0)),
    Shape(20, 33, (1, 1), (6, 5), stride=(2, 1), padding=(1, 2)),
    Shape(24, 48, stride=(2, 2), size=(13, 11)),
    Shape(16, 20, stride=(3, 1), padding=(0, 2), size=(10, 4)),
    Shape(18, 34, padding=(2, 2), dilation=(2, 2), size=(11, 8)),
    Shape(3, 40, padding=(2, 4), dilation=(2, 3)),
    Shape(3, 64, (7, 7), (25, 31), stride=(2, 2), padding=(3, 3), images=3),
    Shape(3, 17, (7, 7), (4, 5), padding=(6, 5)),
    Shape(3, 20, (3, 5), (6, 11), padding=(1, 4), dilation=(2, 2)),
    Shape(1, 8, (5, 5), (12, 7), padding=(2, 2)),
    Shape(40, 24, (5, 5), (6, 9), padding=(2, 2)),
    Shape(17, 32, (1, 7), (6, 12), padding=(0, 3)),
    Shape(4, 18, (1, 7), (5, 9), padding=(0, 3)),
    Shape(19, 21, (7, 1), (9, 5), padding=(3, 0)),
    Shape(128, 128, groups=32, size=(8, 9)),
    Shape(96, 144, groups=3, size=(7, 6), stride=(2, 2)),
    Shape(2048, 8, (1, 1), (3, 5), padding=(0, 0), groups=2),
    Shape(24, 24, groups=24, size=(10, 7)),
    *BUNDLES,
    Shape(6, 12, (3, 3), (5, 5), groups=6, padding=(2, 2), dilation=(2, 2)),
    Shape(8, 16, images=0),
    Shape(600, 70, size=(12, 13), images=1),
)
WINOGRAD = tuple(
    Shape(inputs, outputs, size=size, padding=padding, images=images, tile=tile)
    for tile in (2, 4, 7)
    for inputs, outputs, size, padding, images in (
        (16, 32, (8, 8), (1, 1), 1),
        (33, 47, (7, 10), (1, 1), 3),
        (3, 5, (3, 4), (1, 1), 2),
        (64, 80, (25, 27), (0, 0), 1),
        (20, 16, (5, 9), (2, 3), 2),
        (256, 33, (14, 14), (1, 1), 1),
        (8, 8, (6, 6), (1, 1), 0),
        (24, 40, (14, 21), (1, 1), 2),
    )
)


class Case:
    """Random operands of one shape, the result in fp64 and the kernels'."""

    def __init__(
        self,
        shape: Shape,
        seed: int,
        act: int = 0,
        residual: bool = False,
        bias: bool = True,
        dtype: torch.dtype = torch.float32,
        scale: bool = False,
    ) -> None:
        g = torch.Generator().manual_seed(seed)
        inputs, kernel = shape.inputs // shape.groups, shape.kernel
        self.shape, self.act, self.dtype = shape, act, dtype
        self.x = channels_last(torch.randn(shape.images, shape.inputs, *shape.size, generator=g).to(dtype))
        weight = torch.randn(shape.outputs, inputs, *kernel, generator=g) / (inputs * kernel[0] * kernel[1]) ** 0.5
        self.weight = weight.to(dtype)
        self.bias = torch.randn(shape.outputs, generator=g) if bias else None
        self.scale = torch.randn(shape.outputs, generator=g) if scale else None
        self.windows = shape.stride, shape.padding, shape.dilation, shape.groups
        pixels = self.sums().shape
        self.residual = channels_last(torch.randn(pixels, generator=g).to(dtype)) if residual else None

    def sums(self, dtype: torch.dtype = torch.float64) -> Tensor:
        x, weight = self.x.to(dtype), self.weight.to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        if self.scale is None:
            return F.conv2d(x, weight, bias, *self.windows)
        z = F.conv2d(x, weight, None, *self.windows) * self.scale.to(dtype).view(-1, 1, 1)
        return z if bias is None else z + bias.view(-1, 1, 1)

    def expected(self, dtype: torch.dtype = torch.float64) -> Tensor:
        z = self.sums(dtype)
        return CATALOGUE[self.act].formula(z if self.residual is None else z + self.residual.to(dtype))

    def packed(self) -> Tensor:
        return operators().conv_act_pack(self.weight, self.shape.groups, self.shape.tile)

    def taps(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self.packed(), self.bias, self.scale

    def found(self) -> Tensor:
        return operators().conv_act(self.x, *self.taps(), self.residual, *self.windows, self.act)

    def found_in_place(self) -> Tensor:
        assert self.residual is not None
        operators().conv_act_(self.x, *self.taps(), self.residual, *self.windows, self.act)
        return self.residual


def assert_close(found: Tensor, expected: Tensor, case: Case) -> None:
    """Within the error of sums of that many fp32 products, for Winograd's some times that, and one rounding to bf16."""
    assert found.shape == expected.shape and found.is_contiguous(memory_format=torch.channels_last), case.shape
    assert found.dtype == case.dtype
    if found.numel():
        terms, largest = case.weight[0].numel(), expected.abs().amax().item()
        bar = {1: 1, 2: 4, 4: 4, 7: 24}[case.shape.tile] * 4e-7 * (1 + terms**0.5 / 8) * (1 + largest)
        rounding = expected.abs() / 256 if case.dtype == torch.bfloat16 else 0
        assert ((found.double() - expected).abs() <= bar + rounding).all(), case.shape


@in_both_dtypes
@pytest.mark.parametrize("shape", DIRECT + WINOGRAD, ids=repr)
def test_the_result_is_the_formula_in_fp64(shape, dtype):
    given = (0, False, False, False), (1, True, True, False), (4, False, True, True), (1, True, False, True)
    for seed, (act, residual, bias, scale) in enumerate(given):
        case = Case(shape, seed, act, residual, bias, dtype, scale)
        assert_close(case.found(), case.expected(), case)


@in_both_dtypes
@pytest.mark.parametrize("act", CATALOGUE, ids=lambda act: act.name)
@pytest.mark.parametrize("shape", [Shape(16, 48, size=(9, 7)), Shape(16, 40, size=(9, 7), tile=4)], ids=["1", "4"])
def test_every_activation(shape, act, dtype):
    for residual in (False, True):
        case = Case(shape, 0, act.code, residual, dtype=dtype)
        assert_close(case.found(), case.expected(), case)


@in_both_dtypes
@pytest.mark.parametrize("shape", DIRECT + WINOGRAD, ids=repr)
def test_the_result_may_take_the_residuals_place(shape, dtype):
    for act in (1, 5):
        case = Case(shape, 0, act, residual=True, dtype=dtype, scale=True)
        y = case.found()
        assert torch.equal(case.found_in_place(), y)


@in_both_dtypes
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize(
    "shape",
    [
        Shape(20, 33, size=(11, 9), images=1),
        Shape(19, 33, size=(11, 9), images=1),
        Shape(3, 33, (7, 7), (21, 19), (2, 2), (3, 3), images=1),
        *(Shape(32, 32, groups=groups, size=(11, 9), images=1) for groups in (2, 4, 8, 16)),
        *(Shape(20, 33, size=(11, 9), images=2, tile=tile) for tile in (2, 4, 7)),
    ],
    ids=repr,
)
def test_values_that_are_not_finite_stay_in_their_windows(shape, value, dtype):
    for row, column in ((0, 0), (5, 4), (10, 8), (3, 8)):
        case = Case(shape, 1, act=1, residual=True, dtype=dtype, scale=True)
        case.x[0, 1 if shape.inputs % 2 == 0 else -1, row, column] = value
        expected = case.expected()
        overflow = expected.abs() > torch.finfo(torch.float32).max
        found, finite = case.found().double(), expected[expected.isfinite() & ~overflow]
        # Winograd's errors are small beside the largest value of a tile.
        atol = 1e-5 if shape.tile == 1 else (1e-4 if shape.tile == 7 else 1e-5) * finite.abs().amax().item()
        rtol = 1e-5 if dtype == torch.float32 else 1 / 256 + 1e-5
        torch.testing.assert_close(found[~overflow], expected[~overflow], rtol=rtol, atol=atol, equal_nan=True)
        assert found[overflow].isinf().all()
        torch.testing.assert_close(case.found_in_place().double(), found, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("tile", [1, 2, 4])
def test_winograds_error_is_at_most_four_times_eagers(tile):
    for inputs, size in ((64, 28), (128, 28), (256, 14), (512, 14)):
        for positive in (False, True):
            case = Case(Shape(inputs, 64, size=(size, size), images=1, tile=tile), 0, bias=False)
            if positive:
                case.x.relu_()
            exact = case.expected()
            found, eager = (
                (y.double() - exact).square().mean().sqrt().item() for y in (case.found(), case.sums(torch.float32))
            )
            assert found <= (1.1 if tile == 1 else 4) * eager, (inputs, size, positive, found / eager)


@pytest.mark.parametrize("tile", [1, 2, 4, 7])
def test_in_bfloat16_the_error_is_eagers_at_most(tile):
    for inputs, size in ((64, 28), (256, 14), (512, 7)):
        case = Case(Shape(inputs, 64, size=(size, size), images=1, tile=tile), 0, 1, True, dtype=torch.bfloat16)
        exact = case.expected()
        found, eager = (
            (y.double() - exact).square().mean().sqrt().item() for y in (case.found(), case.expected(torch.bfloat16))
        )
        assert found <= eager, (inputs, size, found / eager)


SHARED = (
    Shape(48, 80, size=(30, 29)),
    Shape(48, 48, size=(30, 29), groups=12),
    Shape(48, 80, size=(30, 29), tile=7),
    Shape(48, 80, size=(2, 9), tile=2),
)


@in_both_dtypes
@pytest.mark.parametrize("shape", [*SHARED, *DIRECT[:13]], ids=repr)
def test_results_are_the_same_bits_whatever_the_threads(shape, dtype):
    threads = torch.get_num_threads()
    case = Case(shape, 0, act=1, residual=True, dtype=dtype)
    first, residual = case.found(), case.residual
    assert residual is not None
    try:
        for count in (1, 2, 3, 1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(case.found(), first), count
            case.residual = residual.clone()  # what nobody computes stays as it is
            assert torch.equal(case.found_in_place(), first), count
            case.residual = residual
    finally:
        torch.set_num_threads(threads)


@in_both_dtypes
@pytest.mark.parametrize("tile", [1, 2, 4, 7])
def test_an_images_result_is_the_same_bits_in_any_batch(tile, dtype):
    case = Case(Shape(24, 40, size=(9, 11), images=3, tile=tile), 0, dtype=dtype)
    whole = case.found()
    for image in range(3):
        case.x = channels_last(case.x)
        one = operators().conv_act(case.x[image : image + 1], *case.taps(), None, *case.windows, case.act)
        assert torch.equal(one[0], whole[image])


@in_both_dtypes
@pytest.mark.parametrize("size", [(30, 28), (5, 6)])
def test_packed_for_one_size_it_serves_any(size, dtype, monkeypatch):
    monkeypatch.setattr(native_convolution, "winograd_tile", lambda *sizes: 4)
    shape = Shape(32, 48, size=(30, 28))
    geometry, act = Geometry(padding=(1, 1)), CATALOGUE[1]
    case = Case(replace(shape, size=size), 0, act.code, residual=True, dtype=dtype, scale=True)
    taps = Filter(case.weight, case.bias, case.scale)
    packed = native_convolution.pack(taps, geometry, (1, 32, *shape.size), True)
    room = 20 if dtype == torch.float32 else 18
    assert packed.weight.shape == (48, 32, 3, 3, room), "bytes a weight: its own, and four in float32 for a tile of 4"
    expected, rtol = case.expected(), 1e-5 if dtype == torch.float32 else 1 / 256 + 1e-5
    y = native_convolution.run(case.x, packed, case.residual, geometry, act, False)
    unpacked = native_convolution.run(case.x, taps, case.residual, geometry, act, False)
    written = native_convolution.run(case.x, packed, case.residual, geometry, act, True)
    assert written is case.residual
    for found in (y, unpacked, written):
        torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=1e-5)


@in_both_dtypes
def test_weights_of_any_strides_are_packed_alike(dtype):
    weight = torch.randn(40, 12, 3, 3).to(dtype)
    strided = torch.randn(3, 12, 80, 6).to(dtype).permute(2, 1, 0, 3)[::2, :, :, ::2].copy_(weight)
    for tile in (1, 2, 4, 7):
        pack = operators().conv_act_pack
        assert torch.equal(pack(weight, 1, tile), pack(strided, 1, tile))


def test_what_the_kernels_cant_read_is_refused():
    case = Case(Shape(8, 16), 0)
    for x in (case.x.contiguous(), case.x.bfloat16(), channels_last(torch.randn(2, 8, 9, 18))[..., ::2]):
        with pytest.raises(RuntimeError, match=r"x must be in channels_last|packed for other groups or another dtype"):
            operators().conv_act(x, case.packed(), None, None, None, *case.windows, 0)
    with pytest.raises(RuntimeError, match="x has 6 channels, and the weight is for 8"):
        operators().conv_act(channels_last(torch.randn(2, 6, 9, 9)), case.packed(), None, None, None, *case.windows, 0)
    with pytest.raises(RuntimeError, match="the weight must come from conv_act_pack"):
        operators().conv_act(case.x, case.weight, None, None, None, *case.windows, 0)
    residual = torch.randn(2, 16, 9, 9)
    with pytest.raises(RuntimeError, match="the residual must be in channels_last"):
        operators().conv_act(case.x, case.packed(), None, None, residual, *case.windows, 0)
    for values, problem in (
        (torch.ones(16).bfloat16(), "float32"),
        (torch.ones(15), "16 values side by side"),
        (torch.ones(32)[::2], "16 values side by side"),
    ):
        for name, taps in (("bias", (values, None)), ("scale", (None, values))):
            with pytest.raises(RuntimeError, match=f"the {name} must be {problem}"):
                operators().conv_act(case.x, case.packed(), *taps, None, *case.windows, 0)
    with pytest.raises(RuntimeError, match="the residual must be of x's dtype"):
        operators().conv_act(case.x, case.packed(), None, None, channels_last(residual).double(), *case.windows, 0)
    with pytest.raises(RuntimeError, match="x must be float32 or bfloat16"):
        operators().conv_act(case.x.double(), case.packed(), None, None, None, *case.windows, 0)
    with pytest.raises(RuntimeError, match="the weight must be float32 or bfloat16"):
        operators().conv_act_pack(case.weight.double(), 1, 1)


@in_both_dtypes
@pytest.mark.parametrize("tile", [1, 4])
@pytest.mark.parametrize("inputs, outputs", [(5, 20), (8, 20), (8, 16)])
def test_opcheck_without_exemptions(inputs, outputs, tile, dtype):
    shape = Shape(inputs, outputs, size=(9, 7), tile=tile)
    if tile == 1:
        shape = replace(shape, inputs=2 * inputs, groups=2, stride=(2, 1), padding=(0, 2), dilation=(1, 2))
    case = Case(shape, 0, act=1, residual=True, dtype=dtype, scale=True)
    arguments = (case.x, *case.taps(), case.residual, *case.windows, case.act)
    torch.library.opcheck(operators().conv_act.default, arguments)
    torch.library.opcheck(operators().conv_act_.default, arguments)
    torch.library.opcheck(operators().conv_act_pack.default, (case.weight, case.shape.groups, tile))


def test_winograd_is_used_where_it_saves_work(monkeypatch):
    tile = native_convolution.winograd_tile
    assert tile(64, 64, 1, 56, 56) == 4 and tile(512, 512, 16, 7, 7) == 4
    assert tile(512, 512, 2, 7, 7) == tile(256, 256, 1, 14, 14) == 2
    assert tile(512, 512, 1, 7, 7) == 1  # 49 pixels don't pay for reading twice the weights, or four times
    assert tile(3, 64, 1, 56, 56) == 1 and tile(512, 512, 1, 1, 1) == 1
    for products, tiles in (("avx512_bf16", (7, 7, 1)), ("avx2", (7, 7, 1)), ("amx", (1, 1, 1))):
        monkeypatch.setattr(native_convolution, "instruction_set", lambda dtype, products=products: products)
        sizes = (64, 64, 1, 56, 56), (512, 512, 16, 7, 7), (512, 512, 1, 7, 7)
        assert tuple(tile(*size, torch.bfloat16) for size in sizes) == tiles, products
    monkeypatch.setenv("FUSEDRES_WINOGRAD", "0")
    assert tile(64, 64, 1, 56, 56) == 1
    monkeypatch.setenv("FUSEDRES_WINOGRAD", "maybe")
    with pytest.raises(ValueError, match="FUSEDRES_WINOGRAD must be 0 or 1; got 'maybe'"):
        tile(64, 64, 1, 56, 56)

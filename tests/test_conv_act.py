"""conv_act on every backend that has convolutions: against fp64, its strides, its gradients, and bad input."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fusedres
from fusedres import dispatch
from fusedres.backends import Filter, onednn
from fusedres.epilogue import CATALOGUE, find
from fusedres.ops import contract, conv_act

# x's sizes, the weight's, geometry: strides and dilations apart, groups, depthwise, odd widths, one pixel, no image
SHAPES: tuple[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]], ...] = (
    ((2, 16, 9, 7), (32, 16, 3, 3), {"padding": 1}),
    ((3, 64, 6, 5), (16, 64, 1, 1), {}),
    ((2, 3, 23, 17), (8, 3, 7, 7), {"stride": 2, "padding": 3}),
    ((2, 35, 8, 11), (17, 35, 3, 1), {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}),
    ((1, 8, 12, 9), (12, 2, 3, 3), {"padding": 2, "dilation": 2, "groups": 4}),
    ((2, 24, 7, 7), (24, 1, 3, 3), {"stride": (1, 2), "padding": 1, "groups": 24}),
    ((2, 24, 8, 7), (24, 4, 3, 3), {"stride": (2, 1), "padding": 1, "groups": 6}),
    ((4, 16, 1, 1), (8, 16, 1, 1), {}),
    ((2, 1, 5, 6), (3, 1, 2, 3), {}),
    ((0, 8, 5, 5), (4, 8, 3, 3), {}),
)
# Few output channels a group, a tensor of both memory orders, and one without elements are other backends'.
UNSERVED_BY_NATIVE = "outputs of one group|in memory, and its convolutions are in channels_last|x is empty"
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
SERVED = [
    ("native", torch.float32, "channels_last"),
    ("native", torch.bfloat16, "channels_last"),
    ("onednn", torch.float32, "channels_last"),
    ("onednn", torch.bfloat16, "channels_last"),
    *(("reference", dtype, layout) for dtype in DTYPES for layout in LAYOUTS),
]


def operands(
    shape: tuple[int, ...], taps: tuple[int, ...], geometry: dict[str, Any], dtype: torch.dtype, layout: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, dtype=torch.float64)

    x, weight, bias = normal(*shape), normal(*taps) / (taps[1] * taps[2] * taps[3]) ** 0.5, normal(taps[0])
    residual = normal(*F.conv2d(x, weight, bias, **geometry).shape)
    order = LAYOUTS[layout]
    x, residual = (t.to(dtype).contiguous(memory_format=order) for t in (x, residual))
    return x, weight.to(dtype), bias.to(dtype), residual


def eager(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, act: str, geometry: dict[str, Any]
) -> Tensor:
    z = F.conv2d(x, weight, bias, **geometry)
    return find(act).formula(z if residual is None else z + residual)


def strides(t: Tensor) -> list[int]:
    """Those that place elements: a dimension of size 1 may carry any."""
    return [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1]


def need_onednn(dtype: torch.dtype) -> None:
    if dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bf16 on this machine")


@pytest.mark.parametrize("backend, dtype, layout", SERVED, ids=str)
@pytest.mark.parametrize("shape, taps, geometry", SHAPES, ids=str)
def test_against_fp64(
    shape: tuple[int, ...],
    taps: tuple[int, ...],
    geometry: dict[str, Any],
    dtype: torch.dtype,
    layout: str,
    backend: str,
    request: pytest.FixtureRequest,
) -> None:
    if backend == "onednn":
        need_onednn(dtype)
    if backend == "native":
        request.getfixturevalue("native")
    x, weight, bias, residual = operands(shape, taps, geometry, dtype, layout)
    groups = geometry.get("groups", 1)
    few = groups > 1 and not 1 < taps[1] == taps[0] // groups  # channels of a group, which are no bundle
    if backend == "native" and (few or 1 in (shape[1], shape[2] * shape[3]) or shape[0] == 0):
        with fusedres.use_backend("native"), pytest.raises(dispatch.Unserved, match=UNSERVED_BY_NATIVE):
            conv_act(x, weight, bias, residual=residual, **geometry)
        return
    wide_x, wide_weight, wide_bias, wide_residual = (t.double() for t in (x, weight, bias, residual))
    terms = F.conv2d(wide_x.abs(), wide_weight.abs(), **geometry) + 5  # 5: more than any bias and residual
    for row in CATALOGUE:
        for with_bias, joins in itertools.product((True, False), repeat=2):
            b, r = bias if with_bias else None, residual if joins else None
            wide_b, wide_r = wide_bias if with_bias else None, wide_residual if joins else None
            exact = eager(wide_x, wide_weight, wide_b, wide_r, row.name, geometry)
            theirs = eager(x, weight, b, r, row.name, geometry)
            before = residual.clone()
            with fusedres.use_backend(backend):
                ours = conv_act(x, weight, b, residual=r, act=row.name, **geometry)
            assert torch.equal(residual, before), "the residual was written to"
            assert ours.dtype == dtype and strides(ours) == strides(theirs)
            bar = max(1.1 * largest(theirs, exact, terms), 4 * torch.finfo(dtype).eps)
            assert largest(ours, exact, terms) <= bar, (row.name, with_bias, joins)


def largest(y: Tensor, exact: Tensor, terms: Tensor) -> float:
    """The largest error in units of the summed terms."""
    return ((y.double() - exact).abs() / terms).max().item() if y.numel() else 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("act", ["relu", "identity", "silu"])
@pytest.mark.parametrize("shape, taps, geometry", SHAPES[:-1], ids=str)
def test_packed_and_in_place_it_is_the_same(
    shape: tuple[int, ...], taps: tuple[int, ...], geometry: dict[str, Any], act: str, dtype: torch.dtype
) -> None:
    need_onednn(dtype)
    x, weight, bias, _ = operands(shape, taps, geometry, dtype, "channels_last")
    call = contract.geometry(**{"stride": 1, "padding": 0, "dilation": 1, "groups": 1} | geometry)
    for size in (x, x[:1], F.pad(x, (0, 2, 3, 0)).contiguous(memory_format=torch.channels_last)):
        r = torch.randn_like(F.conv2d(size, weight, **geometry)).contiguous(memory_format=torch.channels_last)
        expected = eager(size, weight, bias, r, act, geometry)
        taps_packed = onednn.pack(Filter(weight, bias.float()), call, list(x.shape), True)
        y = onednn.run(size, taps_packed, r.clone(memory_format=torch.preserve_format), call, find(act), False)
        written = r.clone(memory_format=torch.preserve_format)
        z = onednn.run(size, taps_packed, written, call, find(act), True)
        assert z.data_ptr() == written.data_ptr() or act == "silu" or x.is_contiguous()
        exact = eager(size.double(), weight.double(), bias.double(), r.double(), act, geometry)
        for found in (y, z):
            assert found.dtype == dtype and rms(found, exact) <= max(1.1 * rms(expected, exact), FLOOR)
    alone = onednn.pack(Filter(weight, bias.float()), call, list(x.shape), False)
    assert alone.bias is not None and alone.bias.dtype == torch.float32
    y = onednn.run(x, alone, None, call, find(act), False)
    exact = eager(x.double(), weight.double(), bias.double(), None, act, geometry)
    assert rms(y, exact) <= max(1.1 * rms(eager(x, weight, bias, None, act, geometry), exact), FLOOR)


FLOOR = torch.finfo(torch.float32).eps


def rms(y: Tensor, exact: Tensor) -> float:
    """The error in units of the exact result."""
    return ((y.double() - exact).norm() / exact.norm()).item()


@pytest.mark.usefixtures("native")
def test_it_is_served_by_kernels_only_where_they_can() -> None:
    x, weight, bias, residual = operands(*SHAPES[0], torch.float32, "channels_last")
    assert served(x, weight, bias) == served(x, weight, bias, residual=residual) == "native"
    assert served(x.bfloat16(), weight.bfloat16(), bias.bfloat16()) == "native"
    assert served(x.bfloat16(), weight.bfloat16(), bias.bfloat16(), residual=residual) == "reference"
    assert served(x, weight[:, :8], bias, groups=2) == "native"
    assert served(x, weight[:, :4], bias, groups=4) == "onednn"  # 8 outputs a group, of 4 inputs
    assert served(x, weight[:16, :4], bias[:16], groups=4) == "native"
    assert served(x, weight[:16, :1], bias[:16], groups=16) == "onednn"
    assert served(x.contiguous(), weight, bias) == "reference"
    assert served(x, weight, bias, residual=residual.contiguous()) == "reference"
    assert served(x.double(), weight.double(), bias.double()) == "reference"
    assert served(x, weight.clone().requires_grad_(), bias) == "reference"
    assert served(x, weight, bias, residual=residual.double()) == "reference"
    with torch.no_grad():
        assert served(x, weight.clone().requires_grad_(), bias) == "native"


def served(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, groups: int = 1) -> str:
    with dispatch.recording(torch.nn.Identity()) as choices:
        conv_act(x, weight, bias, residual=residual, padding=1, groups=groups)
    return choices[0].backend


@pytest.mark.parametrize(
    "backend, change, reason",
    [
        ("onednn", lambda x: x.contiguous(), "x is contiguous in memory, and it fuses in channels_last only"),
        ("native", lambda x: x.contiguous(), "x is contiguous in memory, and its convolutions are in channels_last"),
        ("native", lambda x: x.double(), "x is torch.float64, and its convolutions are in torch.float32 or torc"),
        *(
            (backend, change, reason)
            for backend in ("onednn", "native")
            for change, reason in (
                (lambda x: x.clone().requires_grad_(), "its convolutions have no backward; call it under torch.no_gra"),
                (lambda x: x.to("meta"), "it has no convolutions for meta tensors"),
            )
        ),
    ],
)
def test_a_forced_backend_tells_its_objection(backend: str, change: Any, reason: str) -> None:
    x, weight, bias, _ = operands(*SHAPES[0], torch.float32, "channels_last")
    x = change(x)
    with fusedres.use_backend(backend), pytest.raises(RuntimeError, match=reason):
        conv_act(x, weight.to(x), bias.to(x), padding=1)


def test_backends_without_convolutions_say_so() -> None:
    x, weight, *_ = operands(*SHAPES[0], torch.float32, "channels_last")
    with fusedres.use_backend("cuda"), pytest.raises(RuntimeError, match="it has no conv_act"):
        conv_act(x, weight, padding=1)
    with fusedres.use_backend("onednn"), pytest.raises(RuntimeError, match="it has no affine_act"):
        fusedres.ops.affine_act(x)


@pytest.mark.parametrize("act", [row.name for row in CATALOGUE])
def test_gradients(act: str) -> None:
    x, weight, bias, residual = operands((2, 2, 5, 4), (3, 2, 3, 3), {}, torch.float64, "contiguous")
    leaves = [t.requires_grad_() for t in (x, weight, bias, residual)]

    def call(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return conv_act(x, weight, bias, residual=residual, act=act)

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


def test_compiled_it_is_ordinary_operations() -> None:
    x, weight, bias, residual = operands(*SHAPES[0], torch.float32, "channels_last")

    def call(x: Tensor, residual: Tensor) -> Tensor:
        return conv_act(x, weight, bias, residual=residual, padding=1)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, residual), call(x, residual))


@pytest.mark.usefixtures("native")
def test_nan_passes_the_reference_and_the_kernels_and_is_zero_after_onednns_relu() -> None:
    x, weight = (
        torch.full((1, 2, 2, 2), torch.nan).contiguous(memory_format=torch.channels_last),
        torch.ones(2, 2, 1, 1),
    )
    for backend in ("reference", "native"):
        with fusedres.use_backend(backend):
            assert conv_act(x, weight).isnan().all()
    with fusedres.use_backend("onednn"):
        assert conv_act(x, weight, act="identity").isnan().all()
        assert (conv_act(x, weight) == 0).all()


ONES = torch.ones(1, 4, 1, 1)


@pytest.mark.parametrize(
    "error, message, changes",
    [
        (TypeError, "x must be a floating-point tensor, got torch.int64", {"x": torch.ones(1, 2, 3, 3).long()}),
        (ValueError, r"x and weight must have 4 dimensions, got \(2, 3, 3\)", {"x": torch.ones(2, 3, 3)}),
        (ValueError, "weight must be .O, 5 / groups, rows, columns. with O", {"x": torch.ones(1, 5, 3, 3)}),
        (ValueError, r"weight must be .* multiple of groups=4, got \(4, 2, 3, 3\)", {"groups": 4}),
        (
            ValueError,
            "weight must be torch.float32 on cpu as x is, got torch.float64",
            {"weight": torch.ones(4, 2, 3, 3).double()},
        ),
        (ValueError, r"bias must have shape \(4,\), got \(3,\)", {"bias": torch.ones(3)}),
        (
            ValueError,
            "bias must be torch.float32 on cpu as x is, got torch.bfloat16",
            {"bias": torch.ones(4).bfloat16()},
        ),
        (ValueError, r"x must hold at least one window of \(3, 3\)", {"x": torch.ones(1, 2, 2, 3)}),
        (
            ValueError,
            r"residual must match y: expected \(1, 4, 1, 1\) on cpu, got",
            {"residual": torch.ones(1, 4, 3, 3)},
        ),
        (
            TypeError,
            "residual must be a floating-point tensor, got torch.int64",
            {"residual": torch.ones(1, 4, 1, 1).long()},
        ),
        (ValueError, "stride, dilation and groups must be at least 1", {"stride": 0}),
        (ValueError, "act must be one of identity, relu", {"act": "prelu"}),
    ],
)
def test_bad_input_gets_a_rule_and_a_remedy(error: type[Exception], message: str, changes: dict[str, Any]) -> None:
    given: dict[str, Any] = {"x": torch.ones(1, 2, 3, 3), "weight": torch.ones(4, 2, 3, 3), "bias": None} | changes
    with pytest.raises(error, match=message):
        conv_act(given.pop("x"), given.pop("weight"), given.pop("bias"), **given)

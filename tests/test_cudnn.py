"""cuDNN's backend where there is no GPU: torch's two functions are replaced by their formulas in CPU operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_conv_act import LAYOUTS, SHAPES, eager, operands
from torch import Tensor

import fusedres
from fusedres import dispatch
from fusedres.backends import Filter, Geometry, Request, cudnn
from fusedres.epilogue import CATALOGUE, RELU
from fusedres.ops import contract, conv_act


def formula(name: str) -> Callable[..., Tensor]:
    """What torch's function of this name computes of its operands, which come in the order of its schema."""
    arguments = getattr(torch.ops.aten, name).default._schema.arguments
    assert not any(argument.kwarg_only or argument.is_write for argument in arguments)
    names = [argument.name for argument in arguments]

    def compute(*operands: Any) -> Tensor:
        given = dict(zip(names, operands, strict=True))
        z, alpha = given.pop("z", None), given.pop("alpha", None)
        y = F.conv2d(given.pop("self"), **given)
        if z is not None:
            y = y + z * (1.0 if alpha is None else alpha)
        return y.relu()

    return compute


@pytest.fixture
def formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cudnn_convolution_relu", "cudnn_convolution_add_relu"):
        monkeypatch.setattr(torch, name, formula(name))


@pytest.mark.usefixtures("formulas")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape, taps, geometry", SHAPES, ids=str)
def test_every_operand_comes_to_its_place(
    shape: tuple[int, ...], taps: tuple[int, ...], geometry: dict[str, Any], dtype: torch.dtype, layout: str
) -> None:
    x, weight, bias, residual = operands(shape, taps, geometry, dtype, layout)
    call = contract.geometry(**{"stride": 1, "padding": 0, "dilation": 1, "groups": 1} | geometry)
    assert cudnn.BACKEND.convolution is not None
    for b in (None, bias):
        packed = cudnn.BACKEND.convolution.pack(Filter(weight, None if b is None else b.float()), call, shape, False)
        for r in (None, residual):
            before = residual.clone()
            for in_place in (False, True):
                y = cudnn.run(x, packed, r, call, RELU, in_place)
                assert torch.equal(residual, before), "the residual was written to"
                assert torch.equal(y, eager(x, weight, b, r, "relu", geometry))


FITS = Request(
    "conv_act", "cuda", torch.bfloat16, "channels_last", "relu", 0, torch.bfloat16, torch.bfloat16, "channels_last"
)


@pytest.fixture
def built_with_cudnn(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    return monkeypatch


@pytest.mark.usefixtures("built_with_cudnn")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        *({"dtype": t, "parameter_dtype": t, "residual_dtype": t} for t in (torch.float32, torch.float16)),
        {"parameter_dtype": None, "residual_dtype": None, "residual_layout": None},
        {"layout": "contiguous", "residual_layout": "contiguous"},
        {"layout": "contiguous", "residual_layout": "both"},
        {"tf32": True, "geometry": Geometry((2, 2), (1, 1), (2, 2), 4), "window_positions": 9, "group": (4, 4)},
    ],
)
def test_what_it_serves(changes: dict[str, Any]) -> None:
    assert cudnn.objection(FITS._replace(**changes)) is None


REFUSED = (
    ("it has no convolutions for cpu tensors", {"device": "cpu"}),
    ("torch.compile fuses the reference's operations itself", {"compiling": True}),
    *(
        (f"it fuses relu only, not {activation.name}", {"act": activation.name})
        for activation in CATALOGUE
        if activation is not RELU
    ),
    ("its fused convolutions have no backward; call it under torch.no_grad() or to", {"wants_gradient": True}),
    ("x is a tensor subclass, or empty", {"subclass": True}),
    ("x is a tensor subclass, or empty", {"empty": True}),
    (
        "it has no fused convolution in torch.float64; convert x to one of torch.float32, torch.float16, torch.b",
        {"dtype": torch.float64, "parameter_dtype": torch.float64, "residual_dtype": torch.float64},
    ),
    ("the weight is torch.float32 and x torch.bfloat16; convert one of them", {"parameter_dtype": torch.float32}),
    ("the weight is mixed and x torch.bfloat16; convert one of them", {"parameter_dtype": "mixed"}),
    ("the residual is torch.float32 and x torch.bfloat16; convert one of them", {"residual_dtype": torch.float32}),
    (
        "the residual is contiguous in memory and x channels_last; bring both into one layout",
        {"residual_layout": "contiguous"},
    ),
    ("the residual is channels_last in memory and x both; bring both into one layout", {"layout": "both"}),
)


@pytest.mark.usefixtures("built_with_cudnn")
@pytest.mark.parametrize("message, changes", REFUSED)
def test_what_it_refuses(message: str, changes: dict[str, Any]) -> None:
    reason = cudnn.objection(FITS._replace(**changes))
    assert reason is not None and reason.startswith(message)


def test_a_torch_without_cudnn_is_told_apart_from_what_does_not_fit(built_with_cudnn: pytest.MonkeyPatch) -> None:
    built_with_cudnn.setattr(torch.backends.cudnn, "is_available", lambda: False)
    assert cudnn.objection(FITS) == "this torch is built without cuDNN"
    built_with_cudnn.setattr(torch.backends.cudnn, "is_available", lambda: True)
    built_with_cudnn.setattr(torch.version, "cuda", None)
    assert cudnn.objection(FITS._replace(act="silu")) == "this torch is built without cuDNN"
    assert cudnn.objection(FITS._replace(device="cpu")) == "it has no convolutions for cpu tensors"


def test_forced_on_a_cpu_it_raises_its_objection() -> None:
    x, weight = torch.ones(1, 2, 3, 3, device="cpu"), torch.ones(4, 2, 1, 1, device="cpu")
    message = "'cudnn' was asked for, but it has no convolutions for cpu tensors"
    with fusedres.use_backend("cudnn"), pytest.raises(dispatch.Unserved, match=message):
        conv_act(x, weight)

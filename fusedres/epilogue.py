"""The catalogue of activations: every epilogue of the library ends in one of these rows.

A backend states each activation once more, in its own language, under the same name and code; nothing else
enumerates them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _identity(z: Tensor) -> Tensor:
    return z


@dataclass(frozen=True)
class Activation:
    """One row of the catalogue.

    Args:
        name: the word used everywhere.
        code: the same choice as an integer, for operator schemas and kernels.
        formula: eager PyTorch's own function of the pre-activation.
        derivative: d act / dz, from the output y if `from_output`, else from the pre-activation z. The select
            that ReLU needs at NaN is in the formula: False where eager passes no gradient.
        from_output: whether the backward needs y only, so that z is never recomputed.
        module: the exact `nn.Module` class that means this activation.
        attributes: the attribute values which that module must have.
    """

    name: str
    code: int
    formula: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    from_output: bool
    module: type[nn.Module]
    attributes: tuple[tuple[str, object], ...] = ()

    def __reduce__(self) -> tuple[Callable[[str], Activation], tuple[str]]:
        return find, (self.name,)


def _silu_derivative(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


def _gelu_derivative(z: Tensor) -> Tensor:
    normal_cdf = 0.5 * (1 + torch.erf(z * 0.5**0.5))
    normal_pdf = torch.exp(-0.5 * z * z) * 0.3989422804014327
    return normal_cdf + z * normal_pdf


def _gelu_tanh_derivative(z: Tensor) -> Tensor:
    inner = 0.7978845608028654 * (z + 0.044715 * z**3)
    t = torch.tanh(inner)
    return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * 0.7978845608028654 * (1 + 3 * 0.044715 * z * z)


def _hardswish_derivative(z: Tensor) -> Tensor:
    inner = torch.where(z < 3, z / 3 + 0.5, torch.ones_like(z))
    return torch.where(z <= -3, torch.zeros_like(z), inner)


# !(y <= 0), not y > 0: eager passes the gradient on at NaN.
CATALOGUE = (
    Activation("identity", 0, _identity, torch.ones_like, True, nn.Identity),
    Activation("relu", 1, F.relu, lambda y: ~(y <= 0), True, nn.ReLU),
    Activation("relu6", 2, F.relu6, lambda y: ~((y <= 0) | (y >= 6)), True, nn.ReLU6),
    Activation(
        "leaky_relu",
        3,
        F.leaky_relu,
        lambda y: torch.full_like(y, 0.01).masked_fill_(y > 0, 1.0),
        True,
        nn.LeakyReLU,
        (("negative_slope", 0.01),),
    ),
    Activation("silu", 4, F.silu, _silu_derivative, False, nn.SiLU),
    Activation("gelu", 5, F.gelu, _gelu_derivative, False, nn.GELU, (("approximate", "none"),)),
    Activation(
        "gelu_tanh",
        6,
        partial(F.gelu, approximate="tanh"),
        _gelu_tanh_derivative,
        False,
        nn.GELU,
        (("approximate", "tanh"),),
    ),
    Activation("hardswish", 7, F.hardswish, _hardswish_derivative, False, nn.Hardswish),
)

IDENTITY, RELU = CATALOGUE[:2]
_BY_NAME = {row.name: row for row in CATALOGUE}
_BY_MODULE: dict[type[nn.Module], list[Activation]] = {}
for _row in CATALOGUE:
    _BY_MODULE.setdefault(_row.module, []).append(_row)


def find(name: str) -> Activation:
    """The catalogue's row of that name.

    >>> find("relu").code
    1
    """
    row = _BY_NAME.get(name)
    if row is None:
        raise ValueError(f"act must be one of {', '.join(_BY_NAME)}; got {name!r}")
    return row


def of_module(module: nn.Module) -> Activation | None:
    """The row that `module` computes, or None if the catalogue has none.

    >>> of_module(torch.nn.ReLU(inplace=True)).name
    'relu'
    >>> of_module(torch.nn.LeakyReLU(0.3)) is None
    True
    """
    for row in _BY_MODULE.get(type(module), ()):
        if not row.attributes or all(getattr(module, name) == value for name, value in row.attributes):
            return row
    return None


def settings_of(module: nn.Module) -> set[str]:
    """The attributes that decide which row `module` computes.

    >>> settings_of(torch.nn.GELU())
    {'approximate'}
    """
    return {name for row in _BY_MODULE.get(type(module), ()) for name, _ in row.attributes}

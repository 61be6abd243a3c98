"""conv_act: y = act(conv(x, weight) + bias + residual), a convolution with all that follows it in a block."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres import dispatch
from fusedres.backends import Filter, Geometry, Request
from fusedres.epilogue import Activation
from fusedres.ops import contract


def conv_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    act: str | Activation = "relu",
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    """Convolve, add a bias and a residual, activate: one call of the library's primitive where it has one.

        y = act(conv(x, weight) + bias + residual)

    Made for inference. Where a gradient is wanted it runs as ordinary operations, differentiable to any order.

    Args:
        x: (N, I, H, W); y has its dtype.
        weight: (O, I / groups, rows, columns), of x's dtype.
        bias: (O,), of x's dtype.
        residual: y's shape.
        act: a name of the catalogue, `fusedres.epilogue.CATALOGUE`.
        stride, padding, dilation, groups: those of `torch.nn.functional.conv2d`; rows before columns.

    >>> x = torch.ones(1, 2, 3, 3)
    >>> conv_act(x, -torch.ones(1, 2, 3, 3), torch.tensor([20.0]), residual=torch.full((1, 1, 1, 1), 0.5))
    tensor([[[[2.5000]]]])
    """
    activation = contract.activation(act)
    geometry = contract.geometry(stride, padding, dilation, groups)
    contract.check_convolution(x, weight, bias, residual, geometry)
    found = dispatch.choose(request(x, weight, bias, residual, activation, geometry)).convolution
    assert found is not None  # the dispatcher asks those that have one
    return found.run(x, Filter(weight, bias), residual, geometry, activation, False)


def request(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: Activation,
    geometry: Geometry,
) -> Request:
    """The metadata by which the backend of a convolution is chosen."""
    operands = [t for t in (x, weight, bias, residual) if t is not None]
    return contract.request("conv_act", x, residual, None, activation, weight.dtype)._replace(
        wants_gradient=torch.is_grad_enabled() and any(t.requires_grad for t in operands),
        group=geometry.group(weight.shape),
        window_positions=weight.shape[2] * weight.shape[3],
        geometry=geometry,
        tf32=contract.multiplies_tf32(x.dtype, x.device.type),
    )

"""conv in the compiled CPU library: Winograd's form of a 3x3 convolution and of its two gradients, with fewer products.

    conv_winograd(x, weight, bias, residual, padding, tile, transposed) -> y, or dx of dy where it is transposed
    conv_winograd_(x, weight, residual, padding, tile, transposed): written over the residual
    conv_dweight(dy, x, padding, tile) -> dweight; empty where a sum of it is not finite

float32, channels_last, stride 1. The weight is transformed in every call, so that it is never out of date. With any
other windows aten comes as close to what the machine can do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedres.backends import Geometry, Request, TrainingConvolution, native_convolution, reference
from fusedres.backends.native_convolution import winograd_tile

_KERNEL = (3, 3)
_LIBRARY = torch.library.Library("fusedres_native", "FRAGMENT")
_WEIGHT = "int[2] padding, int tile, bool transposed"
_LIBRARY.define(f"conv_winograd(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, {_WEIGHT}) -> Tensor")
_LIBRARY.define(f"conv_winograd_(Tensor x, Tensor weight, Tensor(a!) residual, {_WEIGHT}) -> ()")
_LIBRARY.define("conv_dweight(Tensor dy, Tensor x, int[2] padding, int tile) -> Tensor")


def _fake_winograd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    padding: Sequence[int],
    tile: int,
    transposed: bool,
) -> Tensor:
    rows, columns = (size + 2 * pad - 2 for size, pad in zip(x.shape[2:], padding, strict=True))
    return x.new_empty((x.shape[0], rows, columns, weight.shape[1 if transposed else 0])).permute(0, 3, 1, 2)


def _fake_winograd_in_place(*arguments: object) -> None:
    pass


def _fake_dweight(dy: Tensor, x: Tensor, padding: Sequence[int], tile: int) -> Tensor:
    return x.new_empty((dy.shape[1], *_KERNEL, x.shape[1])).permute(0, 3, 1, 2)


for _name, _fake in (
    ("conv_winograd", _fake_winograd),
    ("conv_winograd_", _fake_winograd_in_place),
    ("conv_dweight", _fake_dweight),
):
    torch.library.register_fake(f"fusedres_native::{_name}", _fake, lib=_LIBRARY)

# Fewer tiles of 4 are products of too few terms for their errors to vanish among those of the sum.
_FEWEST_TILES = 64
# Of winograd_tile: reading a weight, and transforming it first.
_FRESH_READ = 45


def tiles(sizes: Sequence[int], weight_sizes: Sequence[int], geometry: Geometry) -> tuple[int, int, int]:
    """Of y, of dx and of dweight; 1 where Winograd's form doesn't pay."""
    images, inputs, height, width = sizes
    outputs, _, *kernel = weight_sizes
    if tuple(kernel) != _KERNEL or geometry != Geometry(padding=geometry.padding) or max(geometry.padding) > 2:
        return 1, 1, 1
    rows, columns = geometry.output_size(_KERNEL, height, width)
    of_y = winograd_tile(inputs, outputs, images, rows, columns, read=_FRESH_READ)
    of_dx = winograd_tile(outputs, inputs, images, height, width, read=_FRESH_READ)
    if 1 in (of_y, of_dx):
        return 1, 1, 1
    of_dweight = of_y
    if of_dweight == 4 and images * -(-rows // 4) * -(-columns // 4) < _FEWEST_TILES:
        of_dweight = 2
    return of_y, of_dx, of_dweight


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    tile, _, _ = tiles(x.shape, weight.shape, geometry)
    if tile == 1 or not reference.is_rows(x):
        return reference.conv_forward(x, weight, bias, geometry)
    bias = None if bias is None else bias.contiguous()
    return torch.ops.fusedres_native.conv_winograd(x, weight, bias, None, geometry.padding, tile, False)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    geometry: Geometry,
    wanted: Sequence[bool],
    residual: Tensor | None,
    in_place: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    wants_dx, wants_dweight, wants_dbias = wanted
    _, of_dx, of_dweight = tiles(x.shape, weight.shape, geometry)
    if of_dweight == 1 or not reference.is_rows(dy, x, dy if residual is None else residual):
        return reference.conv_backward(dy, x, weight, geometry, wanted, residual, in_place)
    operators = torch.ops.fusedres_native
    dx = dweight = None
    if wants_dx:
        # The transposed weight's windows reach as far beyond dy as x's didn't reach beyond x.
        padding = 2 - geometry.padding[0], 2 - geometry.padding[1]
        if residual is not None and in_place:
            operators.conv_winograd_(dy, weight, residual, padding, of_dx, True)
            dx = residual
        else:
            dx = operators.conv_winograd(dy, weight, None, residual, padding, of_dx, True)
    if wants_dweight:
        dweight = operators.conv_dweight(dy, x, geometry.padding, of_dweight)
    # Infinity and NaN spread over Winograd's tiles; aten has them where they belong.
    again = dweight is not None and dweight.numel() == 0
    if again or wants_dbias:
        _, found, dbias = reference.conv_backward(dy, x, weight, geometry, (False, again, wants_dbias), None, False)
        return dx, found if again else dweight, dbias
    return dx, dweight, None


TRAINING_CONVOLUTION = TrainingConvolution(forward, backward)


def objection(request: Request) -> str | None:
    """Why the kernels can't serve a request, or shouldn't, as one sentence."""
    if request.geometry is None:
        return "it has to know the sizes"
    if request.dtype != torch.float32:
        return f"it computes training's convolutions in float32, not {str(request.dtype).removeprefix('torch.')}"
    reason = native_convolution.objection(request)
    if reason is None and 1 in tiles(request.sizes, request.weight_sizes, request.geometry):
        reason = "aten is as fast where Winograd's form of a convolution doesn't save products"
    return reason

"""conv in the compiled CPU library: a training step's convolutions and their two gradients.

    conv(x, weight, bias, residual, ..., tile, transposed) -> y, or dx of dy where it is transposed
    conv_(x, weight, residual, ..., tile, transposed): written over the residual
    conv_dweight(dy, x, kernel, ..., tile) -> dweight in float32; of a tile over 1 empty where a sum is not finite

channels_last, float32 or bfloat16 with sums in float32, the bias always in float32. A tile of 1 is the direct form, of
2, 4 or 7 Winograd's (see `native_convolution`). The weight is packed in every call, so that it is never out of date.
In float32 the direct form is left to aten, which comes as close to what the machine can do.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fusedres.backends import Geometry, Request, TrainingConvolution, native_convolution, reference
from fusedres.backends.native_convolution import instruction_set, winograd_is_on, winograd_tile

_KERNEL = (3, 3)
_LIBRARY = torch.library.Library("fusedres_native", "FRAGMENT")
_WINDOWS = "int[2] stride, int[2] padding, int[2] dilation, int tile"
_LIBRARY.define(f"conv(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, {_WINDOWS}, bool transposed) -> Tensor")
_LIBRARY.define(f"conv_(Tensor x, Tensor weight, Tensor(a!) residual, {_WINDOWS}, bool transposed) -> ()")
_LIBRARY.define(f"conv_dweight(Tensor dy, Tensor x, int[2] kernel, {_WINDOWS}) -> Tensor")


def _fake_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    tile: int,
    transposed: bool,
) -> Tensor:
    rows, columns = (
        (size + 2 * pad - gap * (k - 1) - 1) // by + 1
        for size, k, by, pad, gap in zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    )
    return x.new_empty((x.shape[0], rows, columns, weight.shape[1 if transposed else 0])).permute(0, 3, 1, 2)


def _fake_conv_in_place(*arguments: object) -> None:
    pass


def _fake_dweight(dy: Tensor, x: Tensor, kernel: Sequence[int], *windows: object) -> Tensor:
    return x.new_empty((dy.shape[1], *kernel, x.shape[1]), dtype=torch.float32).permute(0, 3, 1, 2)


for _name, _fake in (
    ("conv", _fake_conv),
    ("conv_", _fake_conv_in_place),
    ("conv_dweight", _fake_dweight),
):
    torch.library.register_fake(f"fusedres_native::{_name}", _fake, lib=_LIBRARY)

# Fewer tiles of 4 are products of too few terms for their errors to vanish among those of the sum.
_FEWEST_TILES = 64
# Of winograd_tile: reading a weight, and transforming it first.
_FRESH_READ = 45


class Tiles(NamedTuple):
    """What each of a training step's three results is computed with; 0 where aten does."""

    of_y: int
    of_dx: int
    of_dweight: int


def tiles(
    sizes: Sequence[int], weight_sizes: Sequence[int], geometry: Geometry, dtype: torch.dtype = torch.float32
) -> Tiles:
    """By the work that it takes, counted."""
    return _tiles(tuple(sizes), tuple(weight_sizes), geometry, dtype, winograd_is_on())


@lru_cache(maxsize=4096)  # that of a step's convolutions, which are asked for twice in each
def _tiles(
    sizes: tuple[int, ...], weight_sizes: tuple[int, ...], geometry: Geometry, dtype: torch.dtype, winograd: bool
) -> Tiles:
    images, inputs, height, width = sizes
    outputs, _, *kernel = weight_sizes
    if geometry.groups > 1:
        return Tiles(0, 0, 0)
    of_y = of_dx = of_dweight = 1
    if winograd and tuple(kernel) == _KERNEL and geometry == Geometry(padding=geometry.padding):
        rows, columns = geometry.output_size(_KERNEL, height, width)
        of_y = winograd_tile(inputs, outputs, images, rows, columns, dtype, read=_FRESH_READ)
        of_dx = winograd_tile(outputs, inputs, images, height, width, dtype, read=_FRESH_READ)
        of_dweight = winograd_tile(inputs, outputs, images, rows, columns, dtype)
        if of_dweight == 4 and images * -(-rows // 4) * -(-columns // 4) < _FEWEST_TILES:
            of_dweight = 2
    if geometry.stride != (1, 1) or min(_turned(kernel, geometry)) < 0:
        of_dx = 0
    if dtype is not torch.float32 and instruction_set(dtype) == "amx":
        of_dweight = 0  # aten has it on the tile unit
    found = Tiles(of_y, of_dx, of_dweight)
    return Tiles(0, 0, 0) if dtype is torch.float32 and min(found) <= 1 else found


def _turned(kernel: Sequence[int], geometry: Geometry) -> tuple[int, int]:
    """The padding of dy for dx: its windows reach as far beyond dy as x's didn't reach beyond x."""
    rows, columns = (d * (k - 1) - pad for k, pad, d in zip(kernel, geometry.padding, geometry.dilation, strict=True))
    return rows, columns


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    tile = tiles(x.shape, weight.shape, geometry, x.dtype).of_y
    if not tile or not reference.is_rows(x):
        return reference.conv_forward(x, weight, bias, geometry)
    bias = None if bias is None else bias.float().contiguous()
    return torch.ops.fusedres_native.conv(x, weight, bias, None, *geometry[:3], tile, False)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    geometry: Geometry,
    wanted: Sequence[bool],
    residual: Tensor | None,
    in_place: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    _, of_dx, of_dweight = tiles(x.shape, weight.shape, geometry, x.dtype)
    if not reference.is_rows(dy, x, dy if residual is None else residual):
        of_dx = of_dweight = 0
    dx = dweight = None
    if wanted[0] and of_dx:
        dx = _dx(dy, weight, geometry, of_dx, residual, in_place)
    if wanted[1] and of_dweight:
        # Infinity and NaN spread over Winograd's tiles; aten has them where they belong.
        found = torch.ops.fusedres_native.conv_dweight(dy, x, weight.shape[2:], *geometry[:3], of_dweight)
        dweight = found if found.numel() else None
    own = dx, dweight, None
    rest = [asked and found is None for asked, found in zip(wanted, own, strict=True)]
    if not any(rest):
        return own
    others = reference.conv_backward(dy, x, weight, geometry, rest, residual if rest[0] else None, in_place)
    dx, dweight, dbias = (theirs if left else ours for ours, theirs, left in zip(own, others, rest, strict=True))
    return dx, dweight, dbias


def _dx(dy: Tensor, weight: Tensor, geometry: Geometry, tile: int, residual: Tensor | None, in_place: bool) -> Tensor:
    operators = torch.ops.fusedres_native
    windows = geometry.stride, _turned(weight.shape[2:], geometry), geometry.dilation, tile, True
    if residual is None or not in_place:
        return operators.conv(dy, weight, None, residual, *windows)
    operators.conv_(dy, weight, residual, *windows)
    return residual


TRAINING_CONVOLUTION = TrainingConvolution(forward, backward)


def objection(request: Request) -> str | None:
    """Why the kernels can't serve a request, or shouldn't, as one sentence."""
    if request.geometry is None:
        return "it has to know the sizes"
    reason = native_convolution.objection(request)
    if reason is None and request.geometry.groups > 1:
        reason = "its convolutions of a training step have one group"
    if reason is None and not any(tiles(request.sizes, request.weight_sizes, request.geometry, request.dtype)):
        reason = "aten is as fast where Winograd's form of a convolution doesn't save products"
    return reason

"""conv in the compiled CPU library: a training step's convolutions and their two gradients.

    conv(x, weight, bias, residual, ..., tile, transposed) -> y, or dx of dy where it is transposed
    conv_(x, weight, residual, ..., tile, transposed): written over the residual
    conv_dx(dy, weight, residual, size, ...) -> dx of a strided convolution, with the residual
    conv_dx_(dy, weight, residual, ...): written over the residual
    conv_dweight(dy, x, kernel, ..., tile) -> dweight in float32; of a tile over 1 empty where a sum is not finite
    dweight(dy, x, kernel, ..., tile): the same, and aten's there; written in Python, for torch.compile

channels_last, float32 or bfloat16 with sums in float32, the bias always in float32. A tile of 1 is the direct form, of
2, 4 or 7 Winograd's (see `native_convolution`). The weight is packed in every call, so that it is never out of date,
and rounded on the way where it is float32 and x is not.

By the rule, counted work chooses; in float32 it leaves the direct form of y and dx to aten, which comes as close to
what the machine can do. Times that `fusedres.tune` took choose instead where there are any, for each result by itself.
They are read once, so that a choice holds for the process; nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fusedres import times
from fusedres.backends import Geometry, Request, TrainingConvolution, native_convolution, reference
from fusedres.backends.native_convolution import instruction_set, tiles_of, winograd_is_on, winograd_tile
from fusedres.times import Times

_KERNEL = (3, 3)
_LIBRARY = torch.library.Library("fusedres_native", "FRAGMENT")
_WINDOWS = "int[2] stride, int[2] padding, int[2] dilation, int tile"
_LIBRARY.define(f"conv(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, {_WINDOWS}, bool transposed) -> Tensor")
_LIBRARY.define(f"conv_(Tensor x, Tensor weight, Tensor(a!) residual, {_WINDOWS}, bool transposed) -> ()")
_STRIDED = "int[2] stride, int[2] padding, int[2] dilation"
_LIBRARY.define(f"conv_dx(Tensor dy, Tensor weight, Tensor? residual, int[2] size, {_STRIDED}) -> Tensor")
_LIBRARY.define(f"conv_dx_(Tensor dy, Tensor weight, Tensor(a!) residual, {_STRIDED}) -> ()")
_LIBRARY.define(f"conv_dweight(Tensor dy, Tensor x, int[2] kernel, {_WINDOWS}) -> Tensor")
_LIBRARY.define(f"dweight(Tensor dy, Tensor x, int[2] kernel, {_WINDOWS}) -> Tensor")


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
    kernel = weight.shape[2], weight.shape[3]
    rows, columns = Geometry.of(stride, padding, dilation).output_size(kernel, *x.shape[2:])
    return x.new_empty((x.shape[0], rows, columns, weight.shape[1 if transposed else 0])).permute(0, 3, 1, 2)


def _fake_conv_in_place(*arguments: object) -> None:
    pass


def _fake_dx(dy: Tensor, weight: Tensor, residual: Tensor | None, size: Sequence[int], *windows: object) -> Tensor:
    return dy.new_empty((dy.shape[0], *size, weight.shape[1])).permute(0, 3, 1, 2)


def _fake_dweight(dy: Tensor, x: Tensor, kernel: Sequence[int], *windows: object) -> Tensor:
    return x.new_empty((dy.shape[1], *kernel, x.shape[1]), dtype=torch.float32).permute(0, 3, 1, 2)


for _name, _fake in (
    ("conv", _fake_conv),
    ("conv_", _fake_conv_in_place),
    ("conv_dx", _fake_dx),
    ("conv_dx_", _fake_conv_in_place),
    ("conv_dweight", _fake_dweight),
    ("dweight", _fake_dweight),
):
    torch.library.register_fake(f"fusedres_native::{_name}", _fake, lib=_LIBRARY)

_conv = torch.ops.fusedres_native.conv.default
_conv_in_place = torch.ops.fusedres_native.conv_.default
_conv_dx = torch.ops.fusedres_native.conv_dx.default
_conv_dx_in_place = torch.ops.fusedres_native.conv_dx_.default
_conv_dweight = torch.ops.fusedres_native.conv_dweight.default
_dweight_traced = torch.ops.fusedres_native.dweight.default

# Fewer tiles of 4 are products of too few terms for their errors to vanish among those of the sum.
_FEWEST_TILES = 64
# Of winograd_tile: reading a weight, and transforming it first; in float32 counted high, since of few pixels there is
# little to win and an error to make.
_FRESH_READ = {torch.float32: 45, torch.bfloat16: 10}
# So many fill a vector of dweight's direct form; of fewer its rows are whole windows.
_MANY_INPUTS = 16


class Tiles(NamedTuple):
    """What each of a training step's three results is computed with; 0 where aten does."""

    of_y: int
    of_dx: int
    of_dweight: int


class Problem(NamedTuple):
    """One result of a training step's convolution."""

    result: str  # "y", "dx", "dx+add" where a residual is added to it, "dweight"
    sizes: tuple[int, ...]  # x's
    weight_sizes: tuple[int, ...]
    geometry: Geometry
    dtype: torch.dtype

    @property
    def entry(self) -> str:
        """What a time is for."""
        result, sizes, weight_sizes, (*windows, groups), dtype = self
        lists = "/".join("x".join(map(str, values)) for values in (sizes, weight_sizes, *windows))
        return f"{result}/{times.where('cpu')}/{str(dtype).removeprefix('torch.')}/{lists}/{groups}"


RESULTS = ("y", "dx", "dx+add", "dweight")
# What `tune` collects: the problems that come up, each with the weight's strides.
collected: dict[Problem, tuple[int, ...]] | None = None


def tiles(
    sizes: Sequence[int],
    weight_sizes: Sequence[int],
    geometry: Geometry,
    dtype: torch.dtype = torch.float32,
    *,
    joins: bool = False,
) -> Tiles:
    """By measured times, or by the rule.

    Args:
        joins: whether a residual is added to dx.
    """
    results = "y", "dx+add" if joins else "dx", "dweight"
    problems = (Problem(result, tuple(sizes), tuple(weight_sizes), geometry, dtype) for result in results)
    return Tiles(*(choose(problem)[0] for problem in problems))


def choose(problem: Problem) -> tuple[int, Times]:
    """The tile that computes it, and the times that named it, if any did."""
    ways = candidates(problem)
    found = times.known("cpu", problem.entry) if len(ways) > 1 and times.are_used() else {}
    name = times.fastest([*ways], found)
    if name is None:
        return next(iter(ways.values())), {}
    return ways[name], {name: found[name] for name in ways}


def candidates(problem: Problem) -> dict[str, int]:
    """The tiles that may compute it by name, first the one that the rule names."""
    counted = _counted(problem)
    tiles = _by_rule(problem, counted), 0, *_own(problem, counted)
    return {name_of(tile): tile for tile in dict.fromkeys(tiles)}


def name_of(tile: int) -> str:
    return "aten" if tile == 0 else native_convolution.form(tile)


def _own(problem: Problem, counted: int) -> Iterator[int]:
    """The tiles that there are kernels for, and that are accurate enough."""
    result, sizes, weight_sizes, geometry, dtype = problem
    kernel = weight_sizes[2:]
    if dtype is torch.float32:  # of few terms, and direct, sums lose up to ten times as much as aten's
        yield from (tile for tile in tiles_of(dtype) if tile <= counted)
        if result == "dweight" and geometry.groups == 1:  # but for those over pixels, which are added up in runs
            yield 1
        return
    if not counted:
        return
    yield 1
    if winograd_is_on() and _has_winograd(kernel, geometry):
        rows, columns = geometry.output_size(_KERNEL, *sizes[2:])
        enough = result != "dweight" or _are_enough(sizes[0], rows, columns)
        yield from (tile for tile in tiles_of(dtype) if tile != 4 or enough)


def _are_enough(images: int, rows: int, columns: int) -> bool:
    """Whether there are as many tiles of 4 as a gradient of weights needs."""
    return images * -(-rows // 4) * -(-columns // 4) >= _FEWEST_TILES


def _has_winograd(kernel: Sequence[int], geometry: Geometry) -> bool:
    return tuple(kernel) == _KERNEL and geometry == Geometry(padding=geometry.padding)


def _has_kernel(problem: Problem) -> bool:
    result, _, (_, _, *kernel), geometry, _ = problem
    turns = result.startswith("dx") and geometry.stride == (1, 1)
    return geometry.groups == 1 and (not turns or min(_turned(kernel, geometry)) >= 0)


def _by_rule(problem: Problem, counted: int) -> int:
    """In float32 aten has the direct form, but for weights of many inputs; on the tile unit it has dweight."""
    of_weight = problem.result == "dweight"
    if problem.dtype is torch.float32:
        return 0 if counted == 1 and not (of_weight and problem.weight_sizes[1] >= _MANY_INPUTS) else counted
    return 0 if of_weight and instruction_set(problem.dtype) == "amx" else counted


def _counted(problem: Problem) -> int:
    """The tile of the fewest products; 0 where there is no kernel."""
    result, (images, inputs, height, width), (outputs, _, *kernel), geometry, dtype = problem
    if not _has_kernel(problem):
        return 0
    if not (winograd_is_on() and _has_winograd(kernel, geometry)):
        return 1
    rows, columns = geometry.output_size(_KERNEL, height, width)
    if result == "y":
        return winograd_tile(inputs, outputs, images, rows, columns, dtype, read=_FRESH_READ[dtype])
    if result != "dweight":
        return winograd_tile(outputs, inputs, images, height, width, dtype, read=_FRESH_READ[dtype])
    tile = winograd_tile(inputs, outputs, images, rows, columns, dtype)
    return 2 if tile == 4 and not _are_enough(images, rows, columns) else tile


def _turned(kernel: Sequence[int], geometry: Geometry) -> tuple[int, int]:
    """The padding of dy for dx: its windows reach as far beyond dy as x's didn't reach beyond x."""
    rows, columns = (d * (k - 1) - pad for k, pad, d in zip(kernel, geometry.padding, geometry.dilation, strict=True))
    return rows, columns


def choices_for(request: Request) -> tuple[Tiles, Tiles]:
    """Without a residual that is added to dx, and with one."""
    assert request.geometry is not None  # `_cannot`
    arguments = request.sizes, request.weight_sizes, request.geometry, request.dtype
    return tiles(*arguments), tiles(*arguments, joins=True)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, alone: Tiles, joined: Tiles | None = None
) -> Tensor:
    rows = reference.is_rows(x)
    if collected is not None and rows:
        _collect("y", x, weight, geometry)
    if not rows or not alone.of_y:
        return reference.conv_forward(x, weight.to(x.dtype), bias, geometry)
    bias = None if bias is None else bias.float().contiguous()
    return _conv(x, weight, bias, None, *geometry[:3], alone.of_y, False)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    geometry: Geometry,
    wanted: Sequence[bool],
    residual: Tensor | None,
    in_place: bool,
    alone: Tiles,
    joined: Tiles,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    joins = residual is not None
    if not reference.is_rows(dy, x, residual if joins else dy):
        return reference.conv_backward(dy, x, weight.to(x.dtype), geometry, wanted, residual, in_place)
    if collected is not None:
        _collect("dx+add" if joins else "dx", x, weight, geometry, wanted[0])
        _collect("dweight", x, weight, geometry, wanted[1])
    _, of_dx, of_dweight = joined if joins else alone
    dx = dweight = None
    if wanted[0] and of_dx:
        dx = _dx(dy, x, weight, geometry, of_dx, residual, in_place)
    if wanted[1] and of_dweight:
        compute = _dweight_traced if torch.compiler.is_compiling() else _dweight
        dweight = compute(dy, x, weight.shape[2:], *geometry[:3], of_dweight)
    own = dx, dweight, None
    rest = [asked and found is None for asked, found in zip(wanted, own, strict=True)]
    if not any(rest):
        return own
    weight = weight.to(x.dtype) if rest[0] else torch.empty_like(weight, dtype=x.dtype)  # of which sizes are read
    others = reference.conv_backward(dy, x, weight, geometry, rest, residual if rest[0] else None, in_place)
    dx, dweight, dbias = (theirs if left else ours for ours, theirs, left in zip(own, others, rest, strict=True))
    return dx, dweight, dbias


def _collect(result: str, x: Tensor, weight: Tensor, geometry: Geometry, wanted: bool = True) -> None:
    problem = Problem(result, tuple(x.shape), tuple(weight.shape), geometry, x.dtype)
    if collected is not None and wanted and len(candidates(problem)) > 1:
        collected.setdefault(problem, weight.stride())


def _dweight(
    dy: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    tile: int,
) -> Tensor:
    found = _conv_dweight(dy, x, kernel, stride, padding, dilation, tile)
    if found.numel():
        return found
    # Infinity and NaN spread over Winograd's tiles; aten has them where they belong.
    weight = dy.new_empty((dy.shape[1], x.shape[1], *kernel))
    geometry, wanted = Geometry.of(stride, padding, dilation), (False, True, False)
    _, dweight, _ = reference.conv_backward(dy, x, weight, geometry, wanted, None, False)
    assert dweight is not None  # it was wanted
    return dweight.to(torch.float32, memory_format=torch.channels_last)


_LIBRARY.impl("dweight", _dweight, "CPU")


def _dx(
    dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, tile: int, residual: Tensor | None, in_place: bool
) -> Tensor:
    owned = residual if in_place else None
    if geometry.stride != (1, 1):
        if owned is None:
            return _conv_dx(dy, weight, residual, x.shape[2:], *geometry[:3])
        _conv_dx_in_place(dy, weight, owned, *geometry[:3])
        return owned
    windows = geometry.stride, _turned(weight.shape[2:], geometry), geometry.dilation, tile, True
    if owned is None:
        return _conv(dy, weight, None, residual, *windows)
    _conv_in_place(dy, weight, owned, *windows)
    return owned


def measured(request: Request) -> str | None:
    """The times that choose for a request, in words."""
    if _cannot(request) is not None:
        return None
    found = [(problem.result, *choose(problem)) for problem in _problems(request)]
    return "; ".join(f"{result}: {_words(name_of(tile), known)}" for result, tile, known in found if known) or None


def _words(chosen: str, known: Times) -> str:
    """Its time, and that of the fastest other."""
    other = min((name for name in known if name != chosen), key=known.__getitem__)
    return times.words(chosen, {name: known[name] for name in (chosen, other)})


TRAINING_CONVOLUTION = TrainingConvolution(forward, backward, choices_for, measured, rounds=True)


def objection(request: Request) -> str | None:
    """Why the kernels can't serve a request, or shouldn't, as one sentence."""
    reason = _cannot(request)
    if reason is not None or collected is not None or any(choose(problem)[0] for problem in _problems(request)):
        return reason
    if measured(request) is not None:
        return "aten was measured to be as fast"
    return "aten is as fast where Winograd's form of a convolution doesn't save products"


def _cannot(request: Request) -> str | None:
    if request.geometry is None:
        return "it has to know the sizes"
    reason = native_convolution.objection(request)
    if reason is None and request.geometry.groups > 1:
        reason = "its convolutions of a training step have one group"
    return reason


def _problems(request: Request) -> Iterator[Problem]:
    geometry = request.geometry
    assert geometry is not None  # `_cannot`
    yield from (Problem(name, request.sizes, request.weight_sizes, geometry, request.dtype) for name in RESULTS)

"""What decides whether steps can be one function, and what serves them: metadata only, so that the answer is kept."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedres import dispatch
from fusedres.backends import Request, concrete
from fusedres.backends.ranking import size_class
from fusedres.epilogue import IDENTITY
from fusedres.ops import contract
from fusedres.ops.bn_act import statistics_of
from fusedres.segment.plan import Step


def computing_dtype(x: Tensor) -> torch.dtype:
    """What a convolution of x computes in, and returns."""
    return torch.get_autocast_dtype(x.device.type) if _is_cast(x) else x.dtype


def _is_cast(x: Tensor) -> bool:
    device = x.device.type
    available = x.dtype != torch.float64 and torch._C._is_autocast_available(device)
    return available and torch.is_autocast_enabled(device)


class Requests(NamedTuple):
    """How a segment's operations are described to the dispatcher."""

    norms: list[Request]  # of the chain
    convolutions: list[Request]  # of the chain, then the projection's


# By metadata alone; None where the segment can't be one function.
_known: dict[Any, Requests | None] = {}
_MOST_KNOWN = 4096


def requests_of(
    x: Tensor, shortcut: Tensor | None, dtype: torch.dtype, steps: list[Step], length: int
) -> Requests | None:
    key = (_kind(x), shortcut is x or _kind(shortcut), dtype, _is_cast(x), length, *map(_kind_of_step, steps))
    try:
        return _known[key]
    except KeyError:
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        norms = norms_of(x, shortcut, dtype, steps, length)
        if norms is None:
            _known[key] = None
        else:
            _known[key] = Requests(norms, convolutions_of(x, shortcut, dtype, steps, length))
        return _known[key]


def convolution_of(x: Tensor, dtype: torch.dtype, step: Step) -> Request | None:
    """Of a step's convolution alone; None where it is the module's to compute, or to refuse."""
    weight, groups = step.weight, step.geometry.groups
    if x.dim() != 4 or dispatch.layout(x) != "channels_last" or 0 in x.shape:
        return None
    if weight.device != x.device or weight.shape[1] * groups != x.shape[1] or not _casts(x, step, dtype):
        return None
    if min(step.output_sizes(tuple(x.shape))) < 1:
        return None
    return _convolution(x, dtype, concrete(x.shape), step)


def _kind(t: Tensor | None) -> Any:
    return None if t is None else (type(t), t.shape, t.stride(), t.dtype, t.device)


def _kind_of_step(step: Step) -> Any:
    weight, bias, geometry, norm, act, *_ = step
    members = [None if t is None else (t.shape, t.dtype, t.device) for t in norm[:4]]
    return (_kind(weight), _kind(bias), geometry, act.code, norm.training, norm.eps > 0, *members)


def norms_of(
    x: Tensor, shortcut: Tensor | None, dtype: torch.dtype, steps: list[Step], length: int
) -> list[Request] | None:
    """Of the chain, found anew: torch.compile traces it, and guards on what it reads."""
    chain, projection = steps[:length], steps[length:]
    shapes = _shapes(x, dtype, chain)
    if shapes is None:
        return None
    layout = dispatch.layout(x)
    sizes = [size_class(x.device.type, math.prod(shape)) for shape in shapes[1:]]
    norms = [_request(x, dtype, layout, step, size) for step, size in zip(chain, sizes, strict=True)]
    if shortcut is None:
        return norms
    if type(shortcut) is not Tensor:
        return None
    added, residual = [shortcut.shape], (shortcut.dtype, dispatch.layout(shortcut))
    if projection:
        added, residual = _shapes(shortcut, dtype, projection), (dtype, residual[1])
    # Sums that broadcast or promote are eager's.
    if added is None or added[-1] != shapes[-1] or residual[0] != dtype:
        return None
    norms[-1] = _request(x, dtype, layout, chain[-1], sizes[-1], *residual, *projection)
    return norms


def convolutions_of(
    x: Tensor, shortcut: Tensor | None, dtype: torch.dtype, steps: list[Step], length: int
) -> list[Request]:
    """Of the chain, then of the projection."""
    found, sizes = [], concrete(x.shape)
    for step in steps[:length]:
        found.append(_convolution(x, dtype, sizes, step))
        sizes = concrete(step.output_sizes(sizes))
    if shortcut is not None:
        found += [_convolution(shortcut, dtype, concrete(shortcut.shape), step) for step in steps[length:]]
    return found


def _convolution(source: Tensor, dtype: torch.dtype, sizes: tuple[int, ...], step: Step) -> Request:
    return Request(
        "conv",
        source.device.type,
        dtype,
        dispatch.layout(source),
        IDENTITY.name,
        parameter_dtype=dtype,
        wants_gradient=True,
        group=step.geometry.group(step.weight.shape),
        sizes=sizes,
        weight_sizes=concrete(step.weight.shape),
        geometry=step.geometry,
    )


def _request(
    x: Tensor,
    dtype: torch.dtype,
    layout: str,
    step: Step,
    size: int,
    residual_dtype: torch.dtype | None = None,
    residual_layout: str | None = None,
    projection: Step | None = None,
) -> Request:
    norm_r = None if projection is None else projection.norm
    return Request(
        "bn_act",
        x.device.type,
        dtype,
        layout,
        step.act.name,
        statistics_of(step.norm),
        contract.parameter_dtype(step.norm, norm_r),
        residual_dtype,
        residual_layout,
        statistics_of(norm_r),
        compiling=torch.compiler.is_compiling(),
        size_class=size,
    )


def _shapes(x: Tensor, dtype: torch.dtype, steps: list[Step]) -> list[tuple[int, ...]] | None:
    """The shape of x, and of what every step makes of it, if the function can compute each of them."""
    layout, shape = dispatch.layout(x), tuple(x.shape)
    shapes = [shape]
    if layout == "strided" or 0 in shape:
        return None
    for step in steps:
        weight, norm = step.weight, step.norm
        if weight.device != x.device or not _casts(x, step, dtype):
            return None
        channels, _, *window = weight.shape
        # A channels_last weight makes the result channels_last, whatever x is.
        if layout != "channels_last" and weight.stride()[1:] != (window[0] * window[1], window[1], 1):
            return None
        shape = step.output_sizes(shape)
        if min(shape) < 1 or (norm.training and (norm.eps <= 0 or shape[0] * shape[2] * shape[3] == 1)):
            return None
        if any(t is not None and (t.shape != (channels,) or t.device != x.device) for t in norm[:4]):
            return None
        if not norm.training and (norm.running_mean is None or norm.running_var is None):
            return None
        shapes.append(shape)
    return shapes


def _casts(x: Tensor, step: Step, dtype: torch.dtype) -> bool:
    """Whether eager computes the step's convolution in `dtype`."""
    if _is_cast(x):
        return torch.float64 not in (dtype, *(t.dtype for t in (step.weight, step.bias) if t is not None))
    return all(t.dtype == dtype for t in (x, step.weight, step.bias) if t is not None)

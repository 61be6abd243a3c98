"""A plan made ready for one mode: filters folded and packed, backends chosen, and the loop that runs it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusedres import dispatch, executor
from fusedres.backends import Backend, Convolution, Filter, Request
from fusedres.epilogue import IDENTITY
from fusedres.inference import folding
from fusedres.inference.flatten import Flat, flatten
from fusedres.inference.steps import Convolve, Join, Mode, Normalise, Operation, Step
from fusedres.inference.watch import Watch

_NHWC = torch.channels_last


class Bound(NamedTuple):
    """A step with what it calls."""

    call: Callable[..., Tensor]
    source: int
    residual: int | None
    target: int
    frees: tuple[int, ...]


class Program:
    """A module's plan for one mode, bound while its first input passes through."""

    def __init__(self, module: nn.Module, mode: Mode, flat: Flat | None = None) -> None:
        self.mode = mode
        self.flat = flatten(module, mode) if flat is None else flat
        self.watch = Watch(module, self.flat.hosts, self.flat.gates)
        weights = [step.operation.conv.weight for step in self.flat.steps if isinstance(step.operation, Convolve)]
        self._writes_channels_last = any(_is_channels_last(weight) for weight in weights)
        self._bound: tuple[Bound, ...] = ()

    def bind(self, x: Tensor) -> Tensor:
        """Pack every filter for sizes as they are met; returns the result for x."""
        bound = []
        values: list[Any] = [_in_channels_last(x), *[None] * len(self.flat.steps)]
        for step in self.flat.steps:
            call = self._call(step, values[step.source])
            bound.append(Bound(call, step.source, step.residual, step.target, step.frees))
            _advance(values, bound[-1])
        self._bound = tuple(bound)
        return self._in_eagers_layout(values[-1], x)

    def __call__(self, x: Tensor) -> Tensor:
        values: list[Any] = [_in_channels_last(x), *[None] * len(self._bound)]
        for step in self._bound:
            _advance(values, step)
        return self._in_eagers_layout(values[-1], x)

    def _in_eagers_layout(self, y: Tensor, x: Tensor) -> Tensor:
        if type(y) is not Tensor or y.dim() != 4:
            return y
        interleaved = self._writes_channels_last or _is_channels_last(x)
        return y.contiguous(memory_format=_NHWC if interleaved else torch.contiguous_format)

    def _call(self, step: Step, x: Tensor) -> Callable[..., Tensor]:
        operation = step.operation
        if isinstance(operation, Convolve):
            return _convolve(operation, step, x.shape, self.mode)
        if isinstance(operation, Normalise):
            return partial(_normalise, operation)
        return partial(_join, operation) if isinstance(operation, Join) else operation.target


def backend_of(operation: Operation, mode: Mode) -> Backend | None:
    """Who computes a convolution; None for what is no convolution."""
    if not isinstance(operation, Convolve):
        return None
    residual = (mode.dtype, "channels_last") if operation.parts is not None else (None, None)
    request = Request(
        "conv_act",
        mode.device.type,
        mode.dtype,
        "channels_last",
        operation.act.name,
        parameter_dtype=mode.dtype,
        residual_dtype=residual[0],
        residual_layout=residual[1],
        group_outputs=operation.geometry.group_outputs(operation.conv.out_channels),
    )
    return dispatch.choose(request)


def _advance(values: list[Any], step: Bound) -> None:
    call, source, residual, target, frees = step
    y = call(values[source]) if residual is None else call(values[source], values[residual])
    for slot in frees:
        values[slot] = None
    values[target] = y


def _convolve(operation: Convolve, step: Step, sizes: torch.Size, mode: Mode) -> Callable[..., Tensor]:
    backend = backend_of(operation, mode)
    assert backend is not None and backend.convolution is not None
    convolution, parts = backend.convolution, operation.parts
    taps = convolution.pack(folding.fold(operation, mode.dtype), operation.geometry, sizes, parts is not None)
    dtype = mode.dtype if mode.autocast else None
    if parts is None:
        return partial(_alone, convolution, taps, operation, dtype)
    return partial(_joined, convolution, taps, operation, dtype, step.in_place)


def _alone(convolution: Convolution, taps: Filter, operation: Convolve, dtype: torch.dtype | None, x: Tensor) -> Tensor:
    return convolution.run(_in_channels_last(x, dtype), taps, None, operation.geometry, operation.act, False)


def _joined(
    convolution: Convolution,
    taps: Filter,
    operation: Convolve,
    dtype: torch.dtype | None,
    in_place: bool,
    x: Tensor,
    residual: Tensor,
) -> Tensor:
    x, geometry, conv = _in_channels_last(x, dtype), operation.geometry, operation.conv
    size = geometry.output_size(conv.kernel_size, x.shape[2], x.shape[3])  # pyright: ignore[reportArgumentType]
    if residual.dtype is x.dtype and residual.shape == (x.shape[0], conv.out_channels, *size):
        return convolution.run(x, taps, _in_channels_last(residual), geometry, operation.act, in_place)
    z = convolution.run(x, taps, None, geometry, IDENTITY, False)
    assert operation.parts is not None
    return executor.join(operation.parts, z, None, None, residual, None)


def _normalise(operation: Normalise, x: Tensor) -> Tensor:
    return executor.bn_act(x, operation.norm, operation.act)


def _join(operation: Join, z: Tensor, residual: Tensor) -> Tensor:
    z, norm, gate = executor.run_between(operation.parts, z, operation.norm)
    return executor.join(operation.parts, z, norm, gate, residual, None)


def _in_channels_last(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    if dtype is not None and x.dtype is not dtype:
        return x.to(dtype, memory_format=_NHWC)
    return x if x.dim() != 4 or x.is_contiguous(memory_format=_NHWC) else x.contiguous(memory_format=_NHWC)


def _is_channels_last(t: Tensor) -> bool:
    return t.is_contiguous(memory_format=_NHWC) and not t.is_contiguous()

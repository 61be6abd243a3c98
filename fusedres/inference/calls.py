"""What the steps of a plan call, and how they write into memory that is there."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from fusedres import composed, executor, ops
from fusedres.backends import Affine, Convolution, Filter, Geometry, Head
from fusedres.epilogue import IDENTITY, Activation
from fusedres.executor import Parts
from fusedres.inference.arena import Likeness
from fusedres.inference.steps import Convolve, Join, Normalise, Operation, is_fresh, is_mean

NHWC = torch.channels_last

# (x, residual, y, scratch) -> a call that writes y; x and the residual as `run` would be given them
Prepare = Callable[[Tensor, Tensor | None, Tensor, Tensor | None], Callable[[], object]]


class Calls(NamedTuple):
    """A step made ready.

    Args:
        run: (x) or (x, residual) -> y.
        prepare: how it writes to memory that is there, if it can; for the operands' sizes as they were.
        dtype: what x is cast to.
        scratch: memory that it needs besides.
    """

    run: Callable[..., Tensor]
    prepare: Prepare | None = None
    dtype: torch.dtype | None = None
    scratch: Likeness | None = None


def of_convolution(
    convolution: Convolution,
    taps: Filter,
    operation: Convolve,
    dtype: torch.dtype | None,
    in_place: bool,
    has_ops: bool,
    x: Tensor,
    residual: Tensor | None,
) -> Calls:
    """For operands like these; others that eager accepts are served too, though not prepared.

    Args:
        has_ops: whether `fusedres.ops` can serve; not where a backend was asked for that has convolutions alone.
    """
    geometry, act = operation.geometry, operation.act
    if operation.parts is None:
        run = partial(_alone, convolution, taps, operation, dtype)
    else:
        join = _end if has_ops else composed.join
        run = partial(_joined, convolution, taps, operation, dtype, in_place, join)
    make = convolution.prepare
    if make is None or (residual is not None and not fits(operation, in_channels_last(x, dtype), residual)):
        return Calls(run)

    def prepare(x: Tensor, residual: Tensor | None, y: Tensor, scratch: Tensor | None) -> Callable[[], object]:
        return make(x, taps, residual, geometry, act, y)

    return Calls(run, prepare, dtype)


def of_other(operation: Operation, x: Tensor, has_ops: bool, convolution: Convolution | None, is_wide: bool) -> Calls:
    """Of what is no convolution; `has_ops` as above, and convolutions are computed so.

    Args:
        is_wide: whether a mean may come in float32, since nobody but a fully connected layer reads it.
    """
    if isinstance(operation, Normalise):
        return Calls(partial(_normalise if has_ops else _normalise_as_eager, operation))
    if isinstance(operation, Join):
        return Calls(partial(_join if has_ops else _join_as_eager, operation))
    assert not isinstance(operation, Convolve)  # `of_convolution`
    target = operation.target
    if not is_fresh(operation) or x.dim() != 4 or x.device.type != "cpu":
        return Calls(target)
    if isinstance(target, nn.MaxPool2d):
        if convolution is not None and convolution.max_pool is not None and _has_kernel(target, x):
            return Calls(target, partial(_pool_alone, convolution.max_pool, target))
        positions = Likeness(target(x.to("meta")).shape, torch.int64)
        return Calls(target, partial(_pool, target), scratch=positions)
    if is_mean(operation) and isinstance(target, nn.Module) and x.numel():
        head = None if convolution is None else convolution.head
        if head is not None and x.dtype in head.dtypes and x.is_contiguous(memory_format=NHWC):
            dtype = torch.float32 if is_wide else x.dtype
            return Calls(partial(_mean, head, target, dtype), partial(_mean_into, head))
        if x.dtype.itemsize < 4:
            return Calls(_average, _average_into)
    return Calls(target)


def of_linear(convolution: Convolution, taps: Filter, linear: nn.Linear, dtype: torch.dtype | None) -> Calls:
    """A fully connected layer as a convolution of one pixel."""
    return Calls(partial(_connect, convolution, taps, linear, dtype))


def of_wide_linear(head: Head, taps: Filter, linear: nn.Linear, dtype: torch.dtype) -> Calls:
    """One of a mean that was not rounded."""
    return Calls(partial(_connect_wide, head, taps, linear, dtype))


def _alone(convolution: Convolution, taps: Filter, operation: Convolve, dtype: torch.dtype | None, x: Tensor) -> Tensor:
    return _convolve(convolution, in_channels_last(x, dtype), taps, None, operation.geometry, operation.act, False)


def _joined(
    convolution: Convolution,
    taps: Filter,
    operation: Convolve,
    dtype: torch.dtype | None,
    in_place: bool,
    join: Callable[[Parts, Tensor, Tensor], Tensor],
    x: Tensor,
    residual: Tensor,
) -> Tensor:
    x, geometry = in_channels_last(x, dtype), operation.geometry
    if fits(operation, x, residual):
        return _convolve(convolution, x, taps, in_channels_last(residual), geometry, operation.act, in_place)
    z = _convolve(convolution, x, taps, None, geometry, IDENTITY, False)
    assert operation.parts is not None
    return join(operation.parts, z, residual)


def _end(parts: Parts, z: Tensor, residual: Tensor) -> Tensor:
    return executor.join(parts, z, None, None, residual, None)


def _convolve(
    convolution: Convolution,
    x: Tensor,
    taps: Filter,
    residual: Tensor | None,
    geometry: Geometry,
    act: Activation,
    in_place: bool,
) -> Tensor:
    """By a backend that doesn't scale, all that follows the sums in one pass behind it."""
    if taps.scale is None or convolution.scales:
        return convolution.run(x, taps, residual, geometry, act, in_place)
    sums = convolution.run(x, Filter(taps.weight), None, geometry, IDENTITY, False)
    return ops.affine_act(sums, Affine(taps.scale, taps.bias), residual=residual, act=act)


def fits(operation: Convolve, x: Tensor, residual: Tensor) -> bool:
    """Whether what is added has the result's sizes and dtype; what broadcasts or promotes has not."""
    conv = operation.conv
    size = operation.geometry.output_size(conv.kernel_size, x.shape[2], x.shape[3])  # pyright: ignore[reportArgumentType]
    return residual.dtype is x.dtype and residual.shape == (x.shape[0], conv.out_channels, *size)


def _normalise(operation: Normalise, x: Tensor) -> Tensor:
    return executor.bn_act(x, operation.norm, operation.act)


def _join(operation: Join, z: Tensor, residual: Tensor) -> Tensor:
    z, norm, gate = executor.run_between(operation.parts, z, operation.norm)
    return executor.join(operation.parts, z, norm, gate, residual, None)


def _normalise_as_eager(operation: Normalise, x: Tensor) -> Tensor:
    z, act = operation.norm(x), operation.act
    return act.formula(z) if isinstance(act, Activation) else act(z)


def _join_as_eager(operation: Join, z: Tensor, residual: Tensor) -> Tensor:
    parts = operation.parts
    for child in (*([] if operation.norm is None else [operation.norm]), *parts.between):
        z = child(z)
    gate = parts.gate
    if gate is not None:
        z = z * (gate.view(1, -1, 1, 1) if isinstance(gate, Tensor) and gate.dim() == 1 else gate)
    return composed.join(parts, z, residual)


def _pool(
    pool: nn.MaxPool2d, x: Tensor, residual: Tensor | None, y: Tensor, scratch: Tensor | None
) -> Callable[[], object]:
    """The same operator that the module calls, which finds positions as well."""
    assert scratch is not None  # Calls.scratch
    operator = torch.ops.aten.max_pool2d_with_indices.out
    return partial(operator, x, *_windows(pool), _pair(pool.dilation), pool.ceil_mode, out=y, indices=scratch)


def _pool_alone(
    prepare: Callable[..., Callable[[], object]],
    pool: nn.MaxPool2d,
    x: Tensor,
    residual: Tensor | None,
    y: Tensor,
    scratch: Tensor | None,
) -> Callable[[], object]:
    return prepare(x, *_windows(pool), y)


def _has_kernel(pool: nn.MaxPool2d, x: Tensor) -> bool:
    return _pair(pool.dilation) == [1, 1] and x.is_floating_point() and x.is_contiguous(memory_format=NHWC)


def _windows(pool: nn.MaxPool2d) -> tuple[list[int], list[int], list[int]]:
    """Their sizes, strides and padding."""
    stride = pool.kernel_size if pool.stride is None else pool.stride
    return _pair(pool.kernel_size), _pair(stride), _pair(pool.padding)


def _mean(head: Head, pool: nn.Module, dtype: torch.dtype, x: Tensor) -> Tensor:
    if x.dim() != 4 or not x.numel() or x.dtype not in head.dtypes or x.dtype.itemsize > dtype.itemsize:
        return pool(x)
    y = x.new_empty((*x.shape[:2], 1, 1), dtype=dtype)
    head.prepare_mean(in_channels_last(x), y)()
    return y


def _mean_into(
    head: Head, x: Tensor, residual: Tensor | None, y: Tensor, scratch: Tensor | None
) -> Callable[[], object]:
    return head.prepare_mean(x, y)


def _average(x: Tensor) -> Tensor:
    """What nn.AdaptiveAvgPool2d(1) gives of half precision: as one window it takes a quarter of the time.

    Its sum is added to pixel by pixel in float32, which loses less than the rounding to half precision. Of float32 that
    would be several times eager's error, which adds up partial sums.
    """
    return functional.avg_pool2d(x, x.shape[2:])


def _average_into(x: Tensor, residual: Tensor | None, y: Tensor, scratch: Tensor | None) -> Callable[[], object]:
    return partial(torch.ops.aten.avg_pool2d.out, x, x.shape[2:], out=y)


def _connect(convolution: Convolution, taps: Filter, linear: nn.Linear, dtype: torch.dtype | None, x: Tensor) -> Tensor:
    if x.dim() != 2 or x.shape[1] != linear.in_features or (dtype is None and x.dtype is not linear.weight.dtype):
        return linear(x)
    pixels = x.to(dtype or x.dtype).contiguous().view(-1, 1, 1, linear.in_features).permute(0, 3, 1, 2)
    y = convolution.run(pixels, taps, None, Geometry(), IDENTITY, False)
    return y.view(-1, linear.out_features)


def _connect_wide(head: Head, taps: Filter, linear: nn.Linear, dtype: torch.dtype, x: Tensor) -> Tensor:
    if x.dim() != 2 or x.dtype is not torch.float32 or x.shape[1] != linear.in_features:
        return linear(x.to(dtype))
    return head.connect(x.contiguous(), taps.weight, taps.bias)


def _pair(value: int | tuple[int, ...]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def in_channels_last(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x itself where it is in that memory order and dtype."""
    if dtype is not None and x.dtype is not dtype:
        return x.to(dtype, memory_format=NHWC)
    return x if x.dim() != 4 or x.is_contiguous(memory_format=NHWC) else x.contiguous(memory_format=NHWC)

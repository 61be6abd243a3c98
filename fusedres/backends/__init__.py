"""What every backend is handed, and what it must be able to say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedres.epilogue import Activation

NORM_OPS = ("bn_act", "affine_act", "bn_act_pool")
CONVOLUTIONS = ("conv", "conv_act")  # ops that have functions instead of operators by their name


class Affine(NamedTuple):
    """Per-channel (t - mean) * scale + bias; an absent member is left out of the formula."""

    scale: Tensor | None = None  # (C,)
    bias: Tensor | None = None  # (C,)
    mean: Tensor | None = None  # (C,)


class Norm(NamedTuple):
    """One batch norm at one call, with `torch.nn.functional.batch_norm`'s members and meaning.

    training: statistics come from the batch, and the running ones, where given, move by `momentum`.
    Otherwise the running ones are used as they are (eval mode, frozen).
    """

    weight: Tensor | None = None  # (C,)
    bias: Tensor | None = None  # (C,)
    running_mean: Tensor | None = None  # (C,)
    running_var: Tensor | None = None  # (C,)
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5


class Window(NamedTuple):
    """The windows of a max-pool, rows before columns; what lies beyond x's border never wins."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    def positions(self) -> int:
        """How many values one window compares."""
        return self.kernel_size[0] * self.kernel_size[1]

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of windows over an image."""
        rows, columns = (
            (size + 2 * padding - kernel) // stride + 1
            for size, kernel, stride, padding in zip((height, width), *self, strict=True)
        )
        return rows, columns


def concrete(sizes: Sequence[int]) -> tuple[int, ...]:
    """The sizes; one that is symbolic as it was when torch.compile met it: enough to choose by, no more."""
    return tuple(size if type(size) is int else size.node.hint for size in sizes)  # pyright: ignore[reportAttributeAccessIssue]


class Geometry(NamedTuple):
    """How a convolution's windows lie, rows before columns; padding is with zeros, on both sides."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @classmethod
    def of(cls, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> Geometry:
        """Of one group, from an operator's lists."""
        stride, padding, dilation = ((rows, columns) for rows, columns in (stride, padding, dilation))
        return cls(stride, padding, dilation)

    def group(self, weight: Sequence[int]) -> tuple[int, int]:
        """What a request tells of the groups, from the weight's sizes."""
        return (weight[1], weight[0] // self.groups) if self.groups > 1 else (0, 0)

    def output_size(self, kernel: tuple[int, int], height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the result; less than 1 where the kernel doesn't fit."""
        rows, columns = (
            (size + 2 * padding - dilation * (k - 1) - 1) // stride + 1
            for size, k, stride, padding, dilation in zip((height, width), kernel, *self[:3], strict=True)
        )
        return rows, columns


class Filter(NamedTuple):
    """What a convolution multiplies by and adds."""

    weight: Tensor  # (O, I / groups, H, W), or what a backend has packed it into
    bias: Tensor | None = None  # (O,)
    scale: Tensor | None = None  # (O,) fp32, a factor of the sums


class Statistics(IntEnum):
    """Where a branch's statistics come from; an integer in the operator schemas."""

    ABSENT = 0
    BATCH = 1
    RUNNING = 2


class Request(NamedTuple):
    """What a backend may know of a call before it accepts it: metadata only, so that the choice can be cached."""

    op: str
    device: str  # "cpu", "cuda"
    dtype: torch.dtype
    layout: str  # "contiguous", "channels_last", "both" (such as 1x1 pixels), "strided"
    act: str
    statistics: int = 0
    parameter_dtype: torch.dtype | str | None = None  # "mixed" when they differ
    residual_dtype: torch.dtype | None = None
    residual_layout: str | None = None
    residual_statistics: int = 0
    gate_dtype: torch.dtype | None = None
    empty: bool = False
    subclass: bool = False
    compiling: bool = False
    window_positions: int = 0  # values that one window of a max-pool compares, or of conv_act multiplies
    wants_gradient: bool = False
    group: tuple[int, int] = (0, 0)  # input and output channels of a convolution's group, if it has several
    sizes: tuple[int, ...] = ()  # of what a training step convolves,
    weight_sizes: tuple[int, ...] = ()  # with this
    geometry: Geometry | None = None  # of any convolution
    tf32: bool = False  # whether eager may multiply conv_act's float32 as TF32
    size_class: int = 0  # of what a norm's kernels walk on a GPU

    def disagreement(self) -> str | None:
        """What of a convolution's operands isn't in x's dtype, or not in channels_last, as one sentence."""
        for name, dtype in (("the weight", self.parameter_dtype), ("the residual", self.residual_dtype)):
            if dtype not in (None, self.dtype):
                return f"{name} is {dtype} and x {self.dtype}; convert one of them"
        for name, order in (("x", self.layout), ("the residual", self.residual_layout)):
            if order not in (None, "channels_last"):
                return f"{name} is {order} in memory, and its convolutions are in channels_last; convert it"
        return None


Pack = Callable[[Filter, Geometry, Sequence[int], bool], Filter]


class Head(NamedTuple):
    """The mean of every channel's pixels, and a fully connected layer of it.

    Args:
        dtypes: of x.
        prepare_mean: (x, y) -> a call that computes the mean y, in x's dtype or in float32, of what then lies in x, in
            channels_last.
        connect: (x, weight, bias) -> y = x weight^T + bias, of x and bias in float32 and the weight in bfloat16, whose
            dtype y has.
    """

    dtypes: Set[torch.dtype]
    prepare_mean: Callable[[Tensor, Tensor], Callable[[], object]]
    connect: Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Convolution:
    """How a backend computes conv_act.

    Args:
        pack: (filter, geometry, x's sizes, whether a residual is added) -> the filter as `run` takes it best. Its bias
            may come in a wider dtype than its weight. The sizes are a hint: the result serves inputs of any size.
        run: (x, filter, residual, geometry, act, in_place) -> y. The filter is packed, or all in x's dtype; in_place
            says that the residual's memory may become y's.
        forms: (the weight's shape, geometry, x's sizes, dtype) -> the ways to pack by name, the one that `pack` takes
            first; without it there is one way.
        prepare: (x, packed filter, residual, geometry, act, y) -> a call that computes y from what then lies in x and
            the residual, which may be y. Calls with the same attribute `join` can be made one: join(calls) -> a call.
        scales: whether it multiplies by the filter's scale. Another is given the weight alone where there is one, and
            scale, bias, residual and activation follow in a pass of their own.
        max_pool: (x, kernel, stride, padding, y) -> a call that computes the max-pool y of what then lies in x, both in
            channels_last; None where torch's is as good.
        head: what follows the last convolution; None where torch's is as good.
        reserve: why the rule doesn't name it, where only measured times do, or who forces it.
    """

    pack: Pack
    run: Callable[[Tensor, Filter, Tensor | None, Geometry, Activation, bool], Tensor]
    forms: Callable[[Sequence[int], Geometry, Sequence[int], torch.dtype], Mapping[str, Pack]] | None = None
    prepare: Callable[[Tensor, Filter, Tensor | None, Geometry, Activation, Tensor], Callable[[], object]] | None = None
    scales: bool = False
    max_pool: Callable[..., Callable[[], object]] | None = None
    head: Head | None = None
    reserve: str | None = None


@dataclass(frozen=True)
class TrainingConvolution:
    """How a backend computes conv, the bare convolution of a training step, in two functions.

    Args:
        forward: (x, weight, bias, geometry, *chosen) -> y, all in one dtype, but for `rounds`.
        backward: (dy, x, weight, geometry, wanted, residual, in_place, *chosen) -> (dx, dweight, dbias), of which
            `wanted` says which are to be computed. The residual is added to dx; in_place says that its memory may
            become dx's.
        choose: what both functions are told of a request beside that, found once for all of its calls.
        measured: the times that choose how a request is computed, in words; None where there are none.
        rounds: whether both take float32 weights for an x of fewer bits, and round them as they read them.
    """

    forward: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor | None, Tensor | None, Tensor | None]]
    choose: Callable[[Request], tuple[Any, ...]] = lambda request: ()
    measured: Callable[[Request], str | None] = lambda request: None
    rounds: bool = False


@dataclass(frozen=True, eq=False)
class Backend:
    """One way to compute the ops.

    Either `plain` holds the ops as functions of ordinary operations, which autograd and torch.compile see through,
    or the backend owns kernels: `<op>_forward` and `<op>_backward` for the schemas of `fusedres.ops`, registered for
    the dispatch keys `keys` in the namespace `fusedres_<name>`. `kernels` holds those that are written in Python; a
    compiled library registers its own. Either kind may have convolutions beside them, or have nothing else.

    Args:
        name: the word for `use_backend` and FUSEDRES_BACKEND.
        objection: why it can't serve a request, as one sentence with the remedy, or None.
        ops: what it has beside convolutions.
        convolution: how it computes conv_act, if it does.
        training_convolution: how it computes conv, if it does.
    """

    name: str
    objection: Callable[[Request], str | None]
    plain: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict)
    kernels: Mapping[str, Callable[..., object]] = field(default_factory=dict)
    keys: tuple[str, ...] = ()
    ops: tuple[str, ...] = NORM_OPS
    convolution: Convolution | None = None
    training_convolution: TrainingConvolution | None = None

    def reserve(self, op: str) -> str | None:
        """Why the rule doesn't name it for the op, though it might serve."""
        return self.convolution.reserve if op == "conv_act" and self.convolution is not None else None

    def computes(self, op: str) -> bool:
        """Whether it has the op at all."""
        if op in CONVOLUTIONS:
            return (self.convolution if op == "conv_act" else self.training_convolution) is not None
        return op in self.ops and bool(self.plain or self.keys)

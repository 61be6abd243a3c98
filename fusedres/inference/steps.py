"""What a plan consists of: steps over numbered slots, each freed at its last use."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fusedres.backends import Geometry
from fusedres.epilogue import IDENTITY, Activation
from fusedres.executor import Parts
from fusedres.modules import is_hooked
from fusedres.swap import Call


class Mode(NamedTuple):
    """What a plan is made for.

    Args:
        dtype: that convolutions compute in.
        autocast: whether their operands are cast to it.
        forced: the backend that was asked for.
    """

    device: torch.device
    dtype: torch.dtype
    autocast: bool
    forced: str | None


@dataclass(frozen=True)
class Convolve:
    """act(gate * norm(conv(x)) + residual), the norm and the gate folded into the convolution's weight and bias.

    Args:
        gate: a number, or a tensor of one value or one a channel.
        parts: of the block that it ends; its residual may turn out not to fit, and then eager's rules hold.
    """

    conv: nn.Conv2d
    geometry: Geometry
    norm: nn.Module | None = None
    gate: Tensor | float | None = None
    act: Activation = IDENTITY
    parts: Parts | None = None


@dataclass(frozen=True)
class Normalise:
    """act(norm(x)) where no convolution takes the norm in."""

    norm: nn.Module
    act: nn.Module | Activation


@dataclass(frozen=True)
class Join:
    """A block's end with modules between its last norm and the addition; `norm` is what was not folded."""

    parts: Parts
    norm: nn.Module | None


@dataclass(frozen=True)
class Plain:
    """A module or function called as it is; `reason` says why, where one would expect better."""

    target: Callable[[Tensor], Tensor]
    reason: str | None = None


Operation = Convolve | Normalise | Join | Plain


@dataclass(frozen=True)
class Step:
    """One operation.

    Args:
        source, residual, target: slots; slot 0 is the module's input.
        in_place: whether the residual's memory may become the result's.
        frees: slots that nothing reads after this.
        is_private: whether nobody but the plan's own operations sees the result.
    """

    operation: Operation
    source: int
    residual: int | None
    target: int
    in_place: bool = False
    frees: tuple[int, ...] = ()
    is_private: bool = False


# Their results are new tensors, and they keep no hold of what they are given.
_FRESH = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)


def arrange(steps: Sequence[Step], result: int) -> tuple[Step, ...]:
    """The steps with what each frees, and whether it may write into its residual: nobody else may hold that."""
    last = {slot: index for index, step in enumerate(steps) for slot in (step.source, step.residual)}
    last[result] = len(steps)
    owned = _owned(steps)
    arranged = []
    for index, step in enumerate(steps):
        operands = {step.source} if step.residual is None else {step.source, step.residual}
        frees = tuple(sorted(slot for slot in operands if last[slot] == index))
        in_place = step.residual in owned and step.residual in frees and step.residual != step.source
        is_private = step.target in owned and step.target != result
        arranged.append(replace(step, in_place=in_place, frees=frees, is_private=is_private))
    return tuple(arranged)


def _owned(steps: Sequence[Step]) -> Set[int | None]:
    """Slots of the plan's own making that no module called as it is has seen."""
    made = {step.target for step in steps if _is_private(step.operation)}
    shown = {slot for step in steps if not _is_private(step.operation) for slot in (step.source, step.residual)}
    return made - shown


def _is_private(operation: Operation) -> bool:
    return isinstance(operation, Convolve) or is_fresh(operation)


def is_mean(operation: Operation) -> bool:
    """Whether it is a pool of one window, as above."""
    target = operation.target if isinstance(operation, Plain) else None
    return isinstance(target, nn.AdaptiveAvgPool2d) and target.output_size in (1, (1, 1)) and is_fresh(operation)


def wide_slots(steps: Sequence[Step], is_connecting: Callable[[object], bool]) -> Set[int]:
    """Means, flattened and not, that nobody reads but fully connected layers: they need not be rounded."""
    wide: set[int] = set()
    for step in steps:
        if not is_mean(step.operation):
            continue
        flattened = {reader.target for reader in _readers(steps, step.target) if _flattens(reader.operation)}
        layers = [reader for slot in flattened for reader in _readers(steps, slot)]
        if (
            len(flattened) == len(_readers(steps, step.target)) > 0
            and layers
            and all(isinstance(layer.operation, Plain) and is_connecting(layer.operation.target) for layer in layers)
        ):
            wide |= {step.target, *flattened}
    return wide


def _readers(steps: Sequence[Step], slot: int) -> list[Step]:
    return [step for step in steps if slot in (step.source, step.residual)]


def _flattens(operation: Operation) -> bool:
    """Whether it makes a row of each image."""
    target = operation.target if isinstance(operation, Plain) else None
    if isinstance(target, Call):
        return target.target in (torch.flatten, "flatten") and target.arguments == (1,) and not target.keywords
    if not isinstance(target, nn.Flatten) or type(target) is not nn.Flatten or is_hooked(target):
        return False
    return (target.start_dim, target.end_dim) == (1, -1)


def is_fresh(operation: Operation) -> bool:
    """Whether it is a pool that gives one new tensor, and that no hook looks at."""
    target = operation.target if isinstance(operation, Plain) else None
    if not isinstance(target, _FRESH) or type(target) not in _FRESH or is_hooked(target):
        return False
    return not getattr(target, "return_indices", False)

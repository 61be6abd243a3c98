"""A program's steps for inputs of one size: what each calls, and where its result lies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedres.inference import arena
from fusedres.inference.arena import Life, Likeness
from fusedres.inference.calls import Calls, Prepare, in_channels_last
from fusedres.inference.choice import Choice
from fusedres.inference.steps import Step

Values = list[Any]
TapeCall = tuple[Callable[..., object], bool]


class Changed(Exception):  # noqa: N818  it is an answer
    """What a step is given has another size or dtype than when the plan was made."""


class Bound(NamedTuple):
    """A step with what it calls, and what it was given and gave.

    Args:
        choice: who computes a convolution.
        x, y: None for what has no place in memory of the plan's.
    """

    step: Step
    calls: Calls
    choice: Choice | None
    x: Likeness | None
    y: Likeness | None


class Tape(NamedTuple):
    """A plan laid into a piece of memory.

    Args:
        values: by slot, what lies at a place of its own.
        calls: in order, and whether each takes the values of this call.
    """

    values: Values
    calls: list[TapeCall]

    def __call__(self, x: Tensor) -> Any:
        values = self.values.copy()
        values[0] = x
        for call, takes_values in self.calls:
            if takes_values:
                call(values)
            else:
                call()
        return values[-1]


class Plan:
    """Bound steps, and the place of every result that nobody else sees."""

    def __init__(self, bound: Sequence[Bound]) -> None:
        self.bound = tuple(bound)
        self.choices = tuple(b.choice for b in bound)
        self._roots = _roots(bound)
        last = {slot: index for index, b in enumerate(bound) for slot in b.step.frees}
        lives: dict[int, Life] = {}
        for index, (step, calls, _, _, y) in enumerate(bound):
            root = self._roots.get(step.target)
            if root is not None and y is not None:
                begin = lives[root].begin if root in lives else index
                lives[root] = Life(root, y.bytes, begin, last[step.target])
                if root == step.target and calls.scratch is not None:
                    lives[_scratch_of(step)] = Life(_scratch_of(step), calls.scratch.bytes, index, index)
        self._places, self.bytes = arena.places(lives.values())

    def tape(self, memory: Tensor) -> Tape:
        """The calls, those between places of the memory prepared."""
        values: Values = [None] * (len(self.bound) + 1)
        found: list[TapeCall] = []
        for step, calls, _, given, made in self.bound:
            root = self._roots.get(step.target)
            if root is None or calls.prepare is None or given is None or made is None:
                found.append((_Call(step, calls.run), True))
                continue
            y: Tensor = arena.view(memory, self._places[root], made) if root == step.target else values[root]
            scratch = calls.scratch and arena.view(memory, self._places[_scratch_of(step)], calls.scratch)
            write = _Write(step, calls.prepare, given, calls.dtype, y, scratch)
            x: Tensor | None = values[step.source]
            residual: Tensor | None = None if step.residual is None else values[step.residual]
            values[step.target] = y
            if x is None or calls.dtype not in (None, x.dtype) or (step.residual is not None and residual is None):
                found.append((write, True))
            else:
                found.append((write.prepared(x, residual), False))
        return Tape(values, list(_joined(found)))

    def run_apart(self, x: Tensor) -> Any:
        """The last step's result, each in memory of its own."""
        values: Values = [x, *[None] * len(self.bound)]
        for bound in self.bound:
            advance(values, bound.step, bound.calls.run)
        return values[-1]


def _joined(calls: Sequence[TapeCall]) -> Iterator[TapeCall]:
    """Those in a row that can be one call made one."""
    for join, row in groupby(calls, key=lambda call: getattr(call[0], "join", None)):
        if join is None:
            yield from row
        else:
            yield join([call for call, _ in row]), False


def advance(values: Values, step: Step, run: Callable[..., Any]) -> None:
    """Run a step on the values that it reads."""
    x = values[step.source]
    y = run(x) if step.residual is None else run(x, values[step.residual])
    for slot in step.frees:
        values[slot] = None
    values[step.target] = y


class _Call:
    """A step that makes its own result."""

    def __init__(self, step: Step, run: Callable[..., Any]) -> None:
        self._step, self._run = step, run

    def __call__(self, values: Values) -> None:
        advance(values, self._step, self._run)


class _Write(NamedTuple):
    """A step that writes to a place; called, from what lies elsewhere.

    Args:
        given: what x must be like.
        dtype: what it is cast to.
    """

    step: Step
    prepare: Prepare
    given: Likeness
    dtype: torch.dtype | None
    y: Tensor
    scratch: Tensor | None

    def prepared(self, x: Tensor, residual: Tensor | None) -> Callable[[], object]:
        return self.prepare(x, residual, self.y, self.scratch)

    def __call__(self, values: Values) -> None:
        step, y = self.step, self.y
        x, residual = values[step.source], None if step.residual is None else values[step.residual]
        if Likeness.of(x) != self.given or (residual is not None and Likeness.of(residual) != Likeness.of(y)):
            raise Changed
        self.prepared(in_channels_last(x, self.dtype), None if residual is None else in_channels_last(residual))()
        for slot in step.frees:
            values[slot] = None


def _scratch_of(step: Step) -> int:
    """A key that is no slot."""
    return -step.target


def _roots(bound: Sequence[Bound]) -> dict[int, int]:
    """By slot, the slot whose memory it has, for those that only the plan sees.

    What is written over a residual lies where that lies. One of them that others see keeps all of them out.
    """
    roots: dict[int, int] = {}
    shown: set[int] = set()
    for step, calls, _, _, y in bound:
        root = roots.get(step.residual) if step.in_place and step.residual is not None else None
        if root is None and calls.prepare is not None and y is not None:
            root = step.target
        if root is not None:
            roots[step.target] = root
            if not step.is_private:
                shown.add(root)
    return {slot: root for slot, root in roots.items() if root not in shown}

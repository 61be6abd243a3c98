"""A module taken apart into steps: chains and Sequentials into what they call, blocks into convolutions and joins.

What is not provably a chain, a Sequential or a block is called as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from fusedres import chains, eligibility, families, gates
from fusedres.apart import alone, is_norm, is_norm_act
from fusedres.blocks.block import Block
from fusedres.epilogue import IDENTITY, Activation, of_module
from fusedres.executor import Parts, Span
from fusedres.inference import folding
from fusedres.inference.steps import Convolve, Join, Mode, Normalise, Operation, Plain, Step, arrange
from fusedres.modules import is_batch_norm, is_hooked
from fusedres.proof import activation_of
from fusedres.report import Objection
from fusedres.residual import Host, Residual, resolve
from fusedres.swap import Call, Fused, class_of
from fusedres.tracing import UnprovenError

_Part = nn.Module | Call | Activation | Parts | Plain


class Flat(NamedTuple):
    """A module's steps, and what they rest on: modules' settings and gates, None standing for the module itself."""

    steps: tuple[Step, ...]
    hosts: tuple[tuple[nn.Module | None, tuple[Host, ...]], ...]
    gates: tuple[tuple[nn.Module | None, str], ...]

    @property
    def convolutions(self) -> int:
        return sum(isinstance(step.operation, Convolve) for step in self.steps)


def flatten(module: nn.Module, mode: Mode) -> Flat:
    """What a call of the module comes to in eval mode."""
    return _Flattening(module, mode).flat()


class _Flattening:
    def __init__(self, root: nn.Module, mode: Mode) -> None:
        self._root, self._mode = root, mode
        self._steps: list[Step] = []
        self._hosts: list[tuple[nn.Module | None, tuple[Host, ...]]] = []
        self._gates: list[tuple[nn.Module | None, str]] = []

    def flat(self) -> Flat:
        result = self._emit(list(self._parts(self._root)), 0)
        return Flat(arrange(self._steps, result), tuple(self._hosts), tuple(self._gates))

    def _parts(self, module: nn.Module) -> Iterator[_Part]:
        """What a module calls in order: modules with nothing below them, functions and blocks."""
        is_root = module is self._root
        if not is_root and is_hooked(module):
            yield Plain(module, "it has hooks or a patched forward")
            return
        cls = class_of(module)
        if not any(type(child) is nn.Conv2d or is_norm(child) for child in module.modules()):
            if type(module) is not nn.Identity:
                yield module
            return
        if type(module) is nn.Conv2d or is_batch_norm(module):
            yield module
            return
        if is_norm_act(module) and tuple(module._modules) == ("drop", "act"):
            yield alone(module)
            for child in module.children():
                yield from self._parts(child)
            return
        barrier = eligibility.barrier(module)
        if barrier is not None:
            yield Plain(module, barrier.reason)
            return
        residual, reason = _description(module)
        if residual is not None:
            parts = resolve(module, residual)
            if isinstance(parts, Parts):
                self._rest_on(module, residual.hosts)
                if residual.gate is not None:
                    self._gates.append((None if is_root else module, residual.gate))
                yield parts
                return
            reason = parts
        if isinstance(module, nn.Sequential) and cls.forward is nn.Sequential.forward:
            for child in module._modules.values():
                if child is not None:
                    yield from self._parts(child)
            return
        yield from self._chain(module, reason)

    def _chain(self, module: nn.Module, reason: str | None) -> Iterator[_Part]:
        try:
            called, hosts = chains.of_calls(module, training=False)
        except UnprovenError as unproven:
            yield Plain(module, reason or str(unproven))
            return
        self._rest_on(module, hosts)
        for call in called:
            if isinstance(call, Call):
                yield call
            else:
                yield from self._parts(module.get_submodule(call))

    def _rest_on(self, module: nn.Module, hosts: tuple[Host, ...]) -> None:
        if hosts:
            self._hosts.append((None if module is self._root else module, hosts))

    def _emit(self, parts: list[_Part], slot: int) -> int:
        """Steps for parts called one after the other; the slot of the last result."""
        while parts:
            part, *parts = parts
            if isinstance(part, Parts):
                slot = self._block(part, slot)
            elif isinstance(part, nn.Conv2d) and (geometry := folding.geometry_of(part, self._mode)) is not None:
                norm = None
                if parts and folding.folds(parts[0], self._mode.dtype):
                    norm, *parts = parts
                act, parts = _activation(parts)
                slot = self._add(Convolve(part, geometry, norm, act=act), slot)  # pyright: ignore[reportArgumentType]
            elif isinstance(part, nn.Module) and is_batch_norm(part) and not is_hooked(part):
                act, parts = _activation(parts)
                slot = self._add(Normalise(part, act), slot)
            elif isinstance(part, Plain):
                slot = self._add(part, slot)
            elif isinstance(part, Activation):
                slot = slot if part is IDENTITY else self._add(Plain(part.formula), slot)
            else:
                slot = self._add(Plain(part, _reason(part)), slot)
        return slot

    def _add(self, operation: Operation, source: int, residual: int | None = None) -> int:
        target = len(self._steps) + 1
        self._steps.append(Step(operation, source, residual, target))
        return target

    def _block(self, parts: Parts, slot: int) -> int:
        *inner, last = parts.spans
        z = slot
        for span in inner:
            z = self._stage(span, z)
        if not parts.joins:
            return self._stage(last, z)
        shortcut = [*parts.before_shortcut_norm, *([parts.shortcut_norm] if parts.shortcut_norm is not None else [])]
        residual = self._emit([part for child in shortcut for part in self._parts(child)], slot)
        between = [child for child in parts.between if not _is_idle_gate(child)]
        parts = replace(parts, between=between)
        geometry = folding.geometry_of(last.conv, self._mode)
        if geometry is None or not isinstance(last.conv, nn.Conv2d):
            z = self._add(Plain(last.conv, _reason(last.conv)), z)
            return self._add(Join(parts, last.norm), z, residual)
        if not folding.folds(last.norm, self._mode.dtype):
            z = self._add(Convolve(last.conv, geometry), z)
            return self._add(Join(parts, last.norm), z, residual)
        if (
            between
            or not isinstance(parts.act, Activation)
            or not folding.multiplies(parts.gate, last.conv, self._mode.dtype)
        ):
            z = self._add(Convolve(last.conv, geometry, last.norm), z)
            return self._add(Join(parts, None), z, residual)
        whole = Convolve(last.conv, geometry, last.norm, parts.gate, parts.act, parts)
        return self._add(whole, z, residual)

    def _stage(self, span: Span, slot: int) -> int:
        return self._emit([span.conv, span.norm, *span.before_act, span.act, *span.after_act], slot)


def _description(module: nn.Module) -> tuple[Residual | None, str | None]:
    """What a block is, or what stands against describing it."""
    cls = class_of(module)
    if isinstance(module, Block):
        if cls.forward is Block.forward:
            return (module.residual if module.shortcut is None else module._residual_of_shortcut), None
        return None, None
    description = module.description if isinstance(module, Fused) else None
    if description is None:
        found = families.find(module)
        description = None if found is None else found.description
    if isinstance(description, Objection):
        return None, description.reason
    return (description, None) if isinstance(description, Residual) else (None, None)


def _activation(parts: list[_Part]) -> tuple[Activation, list[_Part]]:
    """The activation that comes next, if it is one of the catalogue, and what is left."""
    if parts:
        first = parts[0]
        act = first if isinstance(first, Activation) else None
        if isinstance(first, Call):
            act = None if first.arguments else activation_of(first.target, dict(first.keywords))
        elif isinstance(first, nn.Module) and not is_hooked(first):
            act = of_module(first)
        if act is not None:
            return act, parts[1:]
    return IDENTITY, parts


def _is_idle_gate(child: nn.Module) -> bool:
    """Whether it's a gate that does nothing in eval mode, such as drop-path."""
    row = None if is_hooked(child) else gates.of_module(child)
    return row is not None and not row.reads and row.factor(child, torch.empty(1, 1, 1, 1)) is None


def _reason(part: nn.Module | Call) -> str | None:
    """Why a convolution is called as it is; nothing else needs a reason."""
    if not isinstance(part, nn.Conv2d):
        return None
    return folding.objection(part)

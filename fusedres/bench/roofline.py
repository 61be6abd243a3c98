"""What a step has to compute and to move: FLOPs and bytes of every layer, under four designs.

    eager   each norm, addition, activation and max-pool is an op of its own
    fused   one op from the norm to the activation
    folded  a stem's max-pool is part of that op, and where a block begins with a 1x1 convolution of stride 1, its
            product for dx accumulates into the shortcut's gradient: what fused blocks do
    whole   norms, additions and activations ride inside the convolutions; in inference a block's
            intermediate results stay on chip too

Bytes are algorithmic: every operand of a pass is read or written once, from memory, and masks are left out. A training
norm passes over its input twice, for the statistics and for the result, and so does its backward.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fusedres import eligibility, fusion
from fusedres.residual import Residual, Stage
from fusedres.swap import Fused


class Design(Enum):
    EAGER = "eager"
    FUSED = "fused"
    FOLDED = "folded"
    WHOLE = "whole"


class Passes(NamedTuple):
    """A count of each direction; in inference there is no backward."""

    forward: int
    backward: int = 0

    @property
    def total(self) -> int:
        return self.forward + self.backward


@dataclass(frozen=True)
class Layer:
    """A convolution, a linear layer, or what is elementwise: norm, addition and activation, a sum of gradients.

    Args:
        name: the module's path, that of the norm where there is one.
        kind: "conv", "linear" or "elementwise".
        what: such as "3x3 64 -> 128 /2" or "bn+add+relu".
        given: the shape of the input.
        shape: that of the output.
    """

    name: str
    kind: str
    what: str
    given: tuple[int, ...]
    shape: tuple[int, ...]
    flops: Passes
    bytes: dict[Design, Passes]

    def seconds(self, design: Design, flops_per_second: float, bytes_per_second: float) -> float:
        """The least time, each direction bound by arithmetic or by memory."""
        return sum(
            max(flops / flops_per_second, moved / bytes_per_second)
            for flops, moved in zip(self.flops, self.bytes[design], strict=True)
        )


@dataclass(frozen=True)
class _Span:
    """What follows a block's convolution, in words of paths in the model."""

    norm: str
    act: bool = False
    adds: bool = False
    shortcut_norm: str | None = None
    # the convolution that reads the block's input, where the gradients of branch and shortcut meet
    entry: str | None = None
    # the stem's max-pool
    pool: str | None = None


class _Call(NamedTuple):
    """What one module was called with in the traced forward."""

    module: nn.Module
    given: torch.Size
    result: torch.Size
    needs_dx: bool


def designs(model: nn.Module, shape: tuple[int, ...], *, training: bool, dtype: torch.dtype) -> dict[Design, int]:
    """The bytes of a step under each design."""
    found = layers(model, shape, training=training, dtype=dtype)
    return {design: sum(layer.bytes[design].total for layer in found) for design in Design}


def layers(model: nn.Module, shape: tuple[int, ...], *, training: bool, dtype: torch.dtype) -> list[Layer]:
    """Every layer of a step on an input of `shape`, in the order of the calls; nothing is computed.

    Args:
        dtype: of the activations and of the weights that the convolutions read.
    """
    described = copy.deepcopy(model)
    fusion.fuse(described)
    blocks = list(_described(described))
    fusion.unfuse(described)
    calls = _calls(described.to("meta").train(training), shape)
    count = _Count(dtype.itemsize, training)
    spans = {span.norm: span for path, residual in blocks for span in _spans(described, path, residual)}
    hidden = {span.shortcut_norm for span in spans.values()}
    ends = _Ends.of(described, blocks)
    found = []
    for name, call in calls.items():
        if isinstance(call.module, nn.Conv2d):
            found.append(count.convolution(name, call, ends))
        elif isinstance(call.module, nn.Linear):
            found.append(count.linear(name, call))
        elif name not in hidden and not isinstance(call.module, nn.MaxPool2d):
            span = spans.get(name, _Span(name))
            found.append(count.norm(name, call, span, calls.get(span.pool or "")))
            if training and span.entry in calls:
                found.append(count.sum_of_gradients(span.entry, calls[span.entry]))
    return found


def _described(model: nn.Module) -> Iterator[tuple[str, Residual]]:
    for path, module in model.named_modules():
        description = module.description if isinstance(module, Fused) else getattr(module, "residual", None)
        if description is not None:
            for residual in eligibility.residuals(description):
                yield path, residual


def _calls(model: nn.Module, shape: tuple[int, ...]) -> dict[str, _Call]:
    calls: dict[str, _Call] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.MaxPool2d | nn.modules.batchnorm._BatchNorm):

            def record(module: nn.Module, given: tuple[Tensor, ...], result: Tensor, path: str = path) -> None:
                calls[path] = _Call(module, given[0].shape, result.shape, given[0].requires_grad)

            module.register_forward_hook(record)
    model(torch.empty(shape, device="meta"))
    return calls


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _spans(model: nn.Module, path: str, residual: Residual) -> Iterator[_Span]:
    adds = residual.shortcut is not None
    for stage in residual.stages[:-1] if adds else residual.stages:
        pool = _join(path, stage.after_act[0]) if stage.after_act else None
        yield _Span(_join(path, stage.norm), act=_acts(model, path, stage), pool=pool)
    if adds:
        last, first = residual.stages[-1], residual.stages[0]
        norm = _projection(model, path, residual, nn.modules.batchnorm._BatchNorm)
        acts = residual.act is not None
        yield _Span(_join(path, last.norm), acts, adds, norm, _join(path, first.conv))


def _acts(model: nn.Module, path: str, stage: Stage) -> bool:
    if not isinstance(stage.act, str):
        return stage.act is not None
    return not isinstance(model.get_submodule(_join(path, stage.act)), nn.Identity)


def _projection(model: nn.Module, path: str, residual: Residual, kind: type[nn.Module]) -> str | None:
    """The path of the shortcut's last module of that kind."""
    roots = (residual.shortcut,) if isinstance(residual.shortcut, str) else residual.shortcut or ()
    found = None
    for root in roots:
        block = model.get_submodule(path) if path else model
        module = dict(block.named_modules()).get(root)
        for name, child in module.named_modules() if module is not None else ():
            if isinstance(child, kind):
                found = _join(_join(path, root), name) if name else _join(path, root)
    return found


@dataclass(frozen=True)
class _Ends:
    """Which convolutions read a block's input from memory and write its output there, and which do neither."""

    reads: set[str]
    writes: set[str]
    inside: set[str]

    @classmethod
    def of(cls, model: nn.Module, blocks: list[tuple[str, Residual]]) -> _Ends:
        reads, writes, inside = set(), set(), set()
        for path, residual in blocks:
            convolutions = [_join(path, stage.conv) for stage in residual.stages]
            projection = _projection(model, path, residual, nn.Conv2d)
            inside |= {*convolutions, *([projection] if projection else [])}
            reads.add(convolutions[0])
            writes.add(convolutions[-1])
        return cls(reads, writes, inside)


@dataclass(frozen=True)
class _Count:
    itemsize: int
    training: bool

    def size(self, shape: torch.Size) -> int:
        return shape.numel() * self.itemsize

    def convolution(self, name: str, call: _Call, ends: _Ends) -> Layer:
        module = call.module
        assert isinstance(module, nn.Conv2d)
        pixels = call.result.numel() // module.out_channels
        taps = module.weight.shape[2] * module.weight.shape[3]
        # a strided 1x1 convolution reads the pixels that it needs, not all
        x = min(self.size(call.given), pixels * module.in_channels * taps * self.itemsize)
        weight = self.size(module.weight.shape)
        flops = 2 * pixels * module.weight.numel()
        moved = self._product(x, self.size(call.given), weight, self.size(call.result), call.needs_dx)
        whole = moved
        if not self.training and name in ends.inside:
            written = self.size(call.result) if name in ends.writes else 0
            whole = Passes((x if name in ends.reads else 0) + weight + written)
        kernel, stride = "x".join(map(str, module.weight.shape[2:])), max(module.stride)
        what = f"{kernel} {module.in_channels} -> {module.out_channels}{f' /{stride}' if stride > 1 else ''}"
        designs = dict.fromkeys(Design, moved) | {Design.WHOLE: whole}
        return self._layer(name, "conv", what, call, flops, designs)

    def linear(self, name: str, call: _Call) -> Layer:
        module = call.module
        assert isinstance(module, nn.Linear)
        flops = 2 * call.result.numel() * module.in_features
        x, y = self.size(call.given), self.size(call.result)
        moved = self._product(x, x, self.size(module.weight.shape), y, call.needs_dx)
        what = f"linear {module.in_features} -> {module.out_features}"
        return self._layer(name, "linear", what, call, flops, dict.fromkeys(Design, moved))

    def _product(self, x: int, dx: int, weight: int, y: int, needs_dx: bool) -> Passes:
        """Forward reads x and weight, writes y; backward is one product for the weight and one for dx."""
        backward = (y + x + weight) + (y + weight + dx if needs_dx else 0)
        return Passes(x + weight + y, backward if self.training else 0)

    def norm(self, name: str, call: _Call, span: _Span, pool: _Call | None) -> Layer:
        tensor = self.size(call.result)
        eager, fused = _training_passes(span) if self.training else _inference_passes(span)
        moved = {
            Design.EAGER: Passes(eager.forward * tensor, eager.backward * tensor),
            Design.FUSED: Passes(fused.forward * tensor, fused.backward * tensor),
            Design.FOLDED: Passes(fused.forward * tensor, fused.backward * tensor),
            Design.WHOLE: Passes(0),
        }
        if pool is not None:
            apart, moved[Design.FOLDED] = self._pooled(tensor, pool)
            for design in (Design.EAGER, Design.FUSED, Design.WHOLE):
                moved[design] = Passes(*map(sum, zip(moved[design], apart, strict=True)))
        norms = ["bn"] if span.shortcut_norm is None else ["bn", "bn"]
        rest = [(span.adds, "add"), (span.act, "act"), (pool is not None, "pool")]
        words = [*norms, *(word for present, word in rest if present)]
        return self._layer(name, "elementwise", "+".join(words), call, 0, moved)

    def _pooled(self, tensor: int, pool: _Call) -> tuple[Passes, Passes]:
        """A max-pool by itself, with int64 indices; and norm, activation and pool as one op, with a byte for each."""
        pooled, indices = self.size(pool.result), pool.result.numel()
        if not self.training:
            return Passes(tensor + pooled + 8 * indices), Passes(tensor + pooled)
        apart = Passes(tensor + pooled + 8 * indices, pooled + 8 * indices + tensor)
        return apart, Passes(2 * tensor + pooled + indices, 2 * (tensor + pooled + indices) + tensor)

    def sum_of_gradients(self, name: str, call: _Call) -> Layer:
        """Where branch and shortcut meet, in the block's input."""
        tensor, module = self.size(call.given), call.module
        moved = dict.fromkeys(Design, Passes(0, 3 * tensor)) | {Design.WHOLE: Passes(0)}
        if isinstance(module, nn.Conv2d) and module.kernel_size == module.stride == (1, 1) and module.groups == 1:
            moved[Design.FOLDED] = Passes(0, tensor)
        return Layer(name, "elementwise", "sum of gradients", tuple(call.given), tuple(call.given), Passes(0), moved)

    def _layer(self, name: str, kind: str, what: str, call: _Call, flops: int, moved: dict[Design, Passes]) -> Layer:
        backward = flops * (1 + call.needs_dx) if self.training else 0
        return Layer(name, kind, what, tuple(call.given), tuple(call.result), Passes(flops, backward), moved)


def _training_passes(span: _Span) -> tuple[Passes, Passes]:
    """Tensors read and written: eager, fused.

    A norm reads x twice and writes y, then reads dy and x twice and writes dx. An addition in place reads two and
    writes one; an activation in place reads and writes one, its backward reads dy and y and writes dx.
    """
    norms = 1 + (span.shortcut_norm is not None)
    eager = Passes(3 * norms + 3 * span.adds + 2 * span.act, 5 * norms + 3 * span.act)
    identity = span.adds and span.shortcut_norm is None
    # each norm's input twice, the identity once, y; dy twice, each input twice, each gradient once
    fused = Passes(2 * norms + identity + 1, 2 + 2 * norms + norms + identity)
    return eager, fused


def _inference_passes(span: _Span) -> tuple[Passes, Passes]:
    norms = 1 + (span.shortcut_norm is not None)
    eager = Passes(2 * norms + 3 * span.adds + 2 * span.act)
    return eager, Passes(1 + span.adds + 1)

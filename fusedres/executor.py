"""The one executor: runs every block of every family, in segments where it can and op by op elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fusedres import gates, ops, segment, synchronised
from fusedres.epilogue import IDENTITY, Activation
from fusedres.memory import Memory
from fusedres.modules import count_batch, dtypes_fit, is_hooked, norm_of, window_of


@dataclass(eq=False)
class Span:
    """A stage's children, resolved."""

    conv: nn.Module
    norm: nn.Module
    before_act: list[nn.Module]
    act: nn.Module | Activation
    after_act: list[nn.Module]
    is_link: bool = field(init=False)  # whether the stage is nothing but conv -> norm -> act

    def __post_init__(self) -> None:
        plain = isinstance(self.act, Activation) and not self.before_act and not self.after_act
        self.is_link = plain and segment.is_bare(self.conv)


@dataclass(eq=False)
class Parts:
    """A block resolved, for as long as its modules stay as they are; see `residual.Residual`."""

    spans: list[Span]
    joins: bool  # whether a shortcut is added
    before_shortcut_norm: list[nn.Module]
    shortcut_norm: nn.Module | None
    between: list[nn.Module]
    gate: Tensor | float | None
    adds_in_place: bool
    act: nn.Module | Activation
    is_segment: bool = field(init=False)  # whether the block is nothing but a chain of links and a shortcut
    convolutions: list[nn.Module] = field(init=False)  # those that a segment computes

    def __post_init__(self) -> None:
        projection = [] if self.shortcut_norm is None else self.before_shortcut_norm[-1:]
        plain = not self.between and self.gate is None and isinstance(self.act, Activation)
        self.is_segment = plain and all(map(segment.is_bare, projection)) and all(span.is_link for span in self.spans)
        self.convolutions = [*(span.conv for span in self.spans), *projection]


def execute(parts: Parts, x: Tensor, memory: Memory) -> Tensor:
    """The block's output."""
    if not parts.joins:
        return _run_stages(parts.spans, x, memory)
    shortcut, children = x, parts.before_shortcut_norm
    if segment.is_possible(x) and parts.is_segment and all(map(segment.is_plain, parts.convolutions)):
        y, shortcut, children = _run_segment(parts, x, memory)
        if y is not None:
            return y
    *inner, last = parts.spans
    z, norm = segment.convolve(last.conv, _run_stages(inner, x, memory)), last.norm
    z, norm, gate = run_between(parts, z, norm)
    for child in children:
        shortcut = segment.convolve(child, shortcut)
    return join(parts, z, norm, gate, shortcut, parts.shortcut_norm)


def join(
    parts: Parts,
    z: Tensor,
    norm: nn.Module | None,
    gate: Tensor | None,
    shortcut: Tensor,
    shortcut_norm: nn.Module | None,
) -> Tensor:
    """Norms, gate, addition and activation of a block's end, in one op where its operands allow."""
    if shortcut.shape != z.shape or (shortcut.dtype != z.dtype and not parts.adds_in_place):
        # eager's own broadcasting, promotion or error
        z = bn_act(z, norm, IDENTITY, gate=gate)
        shortcut = bn_act(shortcut, shortcut_norm, IDENTITY)
        if parts.adds_in_place:
            z += shortcut
        else:
            z = z + shortcut
        return _activate(z, parts.act)
    return bn_act(z, norm, parts.act, residual=shortcut, residual_norm=shortcut_norm, gate=gate)


def _run_segment(parts: Parts, x: Tensor, memory: Memory) -> tuple[Tensor | None, Tensor, list[nn.Module]]:
    """The block as one segment: its output; or None, how far the shortcut is, and which of its children are left."""
    *inner, last = parts.spans
    links = [segment.Link(span.conv, span.norm, span.act) for span in inner]
    links.append(segment.Link(last.conv, last.norm, parts.act))
    shortcut, children, projection = x, parts.before_shortcut_norm, None
    if parts.shortcut_norm is not None:
        *children, conv = children
        projection = segment.Link(conv, parts.shortcut_norm, IDENTITY)
    for child in children:
        shortcut = child(shortcut)
    y = segment.run(x, links, segment.End(shortcut, projection), memory)
    return y, shortcut, [] if projection is None else [projection.conv]


def _run_stages(spans: list[Span], x: Tensor, memory: Memory) -> Tensor:
    """One stage after the other, in segments as long as they can be."""
    z, possible = x, segment.is_possible(x)
    while spans:
        links = []
        for span in spans if possible else ():
            if not span.is_link or not segment.is_plain(span.conv):
                break
            links.append(segment.Link(span.conv, span.norm, span.act))
        y = segment.run(z, links, None, memory) if links else None
        count = max(len(links), 1)
        if y is None:
            y = z
            for span in spans[:count]:
                y = _run_stage(span, y)
        z, spans = y, spans[count:]
    return z


def _run_stage(span: Span, x: Tensor) -> Tensor:
    z, after_act = segment.convolve(span.conv, x), span.after_act
    pooled = None
    if span.before_act:
        z = bn_act(z, span.norm, IDENTITY)
        for child in span.before_act:
            z = child(z)
        z = _activate(z, span.act)
    else:
        if after_act and isinstance(span.act, Activation):
            pooled = _bn_act_pool(z, span.norm, span.act, after_act[0])
        z = bn_act(z, span.norm, span.act) if pooled is None else pooled
    for child in after_act if pooled is None else after_act[1:]:
        z = child(z)
    return z


def _bn_act_pool(x: Tensor, norm: nn.Module, act: Activation, pool: nn.Module) -> Tensor | None:
    """The op on modules, where the child after the activation is a max-pool of at least one window."""
    window = window_of(pool)
    if window is None or not dtypes_fit(x.dtype, norm) or min(window.output_size(*x.shape[2:])) < 1:
        return None
    count_batch(norm)
    kernel_size, stride, padding = window
    return ops.bn_act_pool(x, norm_of(norm), kernel_size=kernel_size, stride=stride, padding=padding, act=act)


def run_between(parts: Parts, z: Tensor, norm: nn.Module | None) -> tuple[Tensor, nn.Module | None, Tensor | None]:
    """What stands between the last norm and the addition: (branch, norm still to be applied, gate)."""
    gate: Tensor | None = None
    if norm is not None and not dtypes_fit(z.dtype, norm):
        z, norm = norm(z), None  # first: a random factor is drawn in the branch's dtype
    for child in parts.between:
        row = None if is_hooked(child) else gates.of_module(child)
        if row is None or row.reads:
            z, norm, gate = bn_act(z, norm, IDENTITY, gate=gate), None, None
        if row is None:
            z = child(z)
            continue
        z, norm, gate = _multiply(z, norm, gate, row.factor(child, z))
    if parts.gate is not None:
        value = parts.gate
        if isinstance(value, Tensor) and value.dim():
            factor = value.reshape(1, -1, 1, 1) if value.dim() == 1 else value
            return _multiply(z, norm, gate, factor)
        factor = _scalar(value, z)
        gate = factor if gate is None else gate * factor
    return z, norm, gate


def _multiply(
    z: Tensor, norm: nn.Module | None, gate: Tensor | None, factor: Tensor | None
) -> tuple[Tensor, nn.Module | None, Tensor | None]:
    """Fold a factor into the gate; one of another dtype than the branch promotes it, which is eager's to do."""
    if factor is None:
        return z, norm, gate
    if factor.dtype != z.dtype or factor.shape[2:] != (1, 1):
        return bn_act(z, norm, IDENTITY, gate=gate) * factor, None, None
    return z, norm, factor if gate is None else gate * factor


def _scalar(value: Tensor | float, z: Tensor) -> Tensor:
    """A number, or a tensor without dimensions, as a gate: neither promotes the branch, nor is it rounded to it."""
    if isinstance(value, Tensor):
        return value.reshape(1, 1, 1, 1)
    return z.new_full((1, 1, 1, 1), value, dtype=torch.promote_types(z.dtype, torch.float32))


def _activate(z: Tensor, act: nn.Module | Activation) -> Tensor:
    return act.formula(z) if isinstance(act, Activation) else act(z)


def bn_act(
    x: Tensor,
    norm: nn.Module | None,
    act: nn.Module | Activation,
    *,
    residual: Tensor | None = None,
    residual_norm: nn.Module | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """The op on modules: their parameters, buffers and counters as `nn.BatchNorm2d.forward` uses them."""
    if norm is not None and not dtypes_fit(x.dtype, norm):
        x, norm = norm(x), None
    if residual_norm is not None and residual is not None and not dtypes_fit(residual.dtype, residual_norm):
        residual, residual_norm = residual_norm(residual), None
    row = act if isinstance(act, Activation) else IDENTITY
    group, group_r = synchronised.group_of(norm), synchronised.group_of(residual_norm)
    if group is not None or group_r is not None:
        y = None
        joint = residual_norm is None or synchronised.are_joint(row, group, group_r)
        if norm is not None and group is not None and joint:
            y = synchronised.bn_act(x, norm, residual, residual_norm, gate, row, group)
        if y is not None:
            return y if isinstance(act, Activation) else act(y)
        # Each by itself, and then the rest.
        if norm is not None and group is not None:
            x, norm = _synchronise(x, norm, group), None
        if residual is not None and residual_norm is not None and group_r is not None:
            residual, residual_norm = _synchronise(residual, residual_norm, group_r), None
    if norm is None and residual_norm is None:
        if residual is None and gate is None:
            return _activate(x, act)
        y = ops.affine_act(x, residual=residual, gate=gate, act=row)
    else:
        # Before the op, as eager does: a checkpoint's second forward ends where the op has saved its tensors.
        count_batch(norm)
        count_batch(residual_norm)
        y = ops.bn_act(
            x,
            None if norm is None else norm_of(norm),
            residual=residual,
            residual_norm=None if residual_norm is None else norm_of(residual_norm),
            gate=gate,
            act=row,
        )
    return y if isinstance(act, Activation) else act(y)


def _synchronise(x: Tensor, norm: nn.Module, group: Any) -> Tensor:
    y = synchronised.bn_act(x, norm, None, None, None, IDENTITY, group)
    return norm(x) if y is None else y

"""What a residual block is, and whether a call of one can be fused.

A `Residual` names the children of a block that make up

    y = act(gate * norm(conv(... act(norm(conv(x))))) + shortcut(x))

and `run` has `fusedres.executor` compute it. Wherever the formula does not apply, the block's own eager path is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module

from fusedres import composed, dispatch
from fusedres.apart import alone
from fusedres.epilogue import IDENTITY, Activation, of_module, settings_of
from fusedres.executor import Parts, Span, execute
from fusedres.memo import MISSING, Reader, is_same, recall, remember
from fusedres.memory import Memory, of_block
from fusedres.modules import is_hooked, norm_objection


@dataclass(frozen=True)
class Stage:
    """conv -> norm -> act, by the children's paths in the block; what is absent or Identity is passed over.

    Args:
        conv: any module that maps the span's input to what is normalised.
        norm: the batch norm.
        act: a child, or a row of the catalogue where the block calls a function.
        before_act: children between the norm and the activation (drop_block).
        after_act: children after the activation (anti-aliasing; a max-pool, which is fused with it).
    """

    conv: str
    norm: str
    act: str | Activation | None = None
    before_act: tuple[str, ...] = ()
    after_act: tuple[str, ...] = ()


@dataclass(frozen=True)
class Host:
    """A module whose forward the description stands for, and what must hold for it to do so.

    Args:
        path: of a module whose own forward is passed over, since the description names its children; "" is the block.
        kind: the module's class; None is not looked at.
        children: how many children it has; None is not looked at.
        attributes: names and values that its forward depends on.
    """

    path: str
    kind: type[nn.Module] | None = None
    children: int | None = None
    attributes: tuple[tuple[str, object], ...] = ()


@dataclass(frozen=True)
class Residual:
    """A chain of stages, what multiplies it, what is added to it, and the activation after that.

    Args:
        stages: in order; the last one has no activation of its own where a shortcut follows.
        shortcut: the path of the projection, or its children's paths where no nn.Sequential holds them; a child that
            is None or empty is the identity. None adds nothing.
        between: children between the last norm and the addition, in order (attention, drop-path). Those that only
            multiply (`fusedres.gates`) become the formula's gate.
        gate: an attribute that multiplies the branch just before the addition: a tensor of one value or of C, or a
            number (LayerScale, an Euler step).
        act: the activation after the addition.
        adds_in_place: whether the sum has the branch's dtype and shape (`out += x`), or is promoted and broadcast.
        hosts: the modules that are passed over, wherever a path has a dot and is not in an nn.Sequential projection. A
            convolution or norm among them, which holds what follows it, does its own operation only (`apart`).

    >>> basic = Residual((Stage("conv1", "bn1", "relu"), Stage("conv2", "bn2")), shortcut="downsample", act="relu")
    """

    stages: tuple[Stage, ...]
    shortcut: str | tuple[str, ...] | None = None
    between: tuple[str, ...] = ()
    gate: str | None = None
    act: str | Activation | None = None
    adds_in_place: bool = True
    hosts: tuple[Host, ...] = ()
    apart: Set[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        called = {path for stage in self.stages for path in (stage.conv, stage.norm)}
        called.update(self.shortcut if isinstance(self.shortcut, tuple) else ())
        object.__setattr__(self, "apart", called & {host.path for host in self.hosts})


def resolve(block: nn.Module, residual: Residual) -> Parts | str:
    """The block's children as they are now, or why it would take its eager path, whatever the input."""
    return _resolve(Reader(block), residual)


def objection(block: nn.Module, residual: Residual) -> str | None:
    """Why the block as it is now would take its eager path, whatever the input."""
    parts = resolve(block, residual)
    return parts if isinstance(parts, str) else None


def run(block: nn.Module, residual: Residual, x: Tensor, eager: Callable[[Tensor], Tensor]) -> Tensor:
    """The block's output: fused, or by `eager` wherever the formula does not apply to this call."""
    parts = ambient_objection(block, x) or _parts(block, residual)
    if dispatch.recorder is None:
        return _compute(block, parts, x, eager)
    reason = parts if isinstance(parts, str) else _SMALL if _is_small(block, parts, x) else None
    with dispatch.recorder.inside(block, reason):
        return _compute(block, parts, x, eager)


def _compute(block: nn.Module, parts: Parts | str, x: Tensor, eager: Callable[[Tensor], Tensor]) -> Tensor:
    if isinstance(parts, str):
        return eager(x)
    if not _is_small(block, parts, x):
        return execute(parts, x, of_block(block))
    return composed.execute(parts, x) if composed.is_possible(parts) else eager(x)


_SMALL = "the input is small: PyTorch's own operators are faster below FUSEDRES_MIN_ELEMENTS elements"


def _is_small(block: nn.Module, parts: Parts, x: Tensor) -> bool:
    """Whether a kernel's call costs more than it saves, and nothing else asks for it; this runs in every tiny call.

    A chain without a shortcut is never small: a stem's input says little about what its norm takes.
    """
    return (
        not torch.compiler.is_compiling()  # a size may be symbolic there
        and x.numel() < dispatch.min_elements
        and x.is_cpu
        and parts.joins
        and not dispatch.is_forced()
        and of_block(block) is Memory.FAST
        and not _synchronises(block)
    )


def _synchronises(block: nn.Module) -> bool:
    """Whether a norm does, or might: torch's own refuses CPU tensors."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    return any(type(module) is nn.SyncBatchNorm for module in block.modules())


def ambient_objection(block: nn.Module, x: Tensor) -> str | None:
    """What makes the block take its eager path in this call, whatever its description."""
    if dispatch.disabled:
        return "FUSEDRES_DISABLE is set"
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return f"the input is a {type(x).__name__}, not a plain tensor"
    if x.dim() != 4:
        return f"the input has {x.dim()} dimensions, not 4"
    if nn_module._has_any_global_hook():
        return "global module hooks are set"
    if torch._C._are_functorch_transforms_active():
        return "a functorch transform is active"
    if torch.compiler.is_compiling():
        # The flag itself: torch 2.11 traces is_exporting() as true under any torch.compile.
        return "the model is being exported" if torch.compiler._is_exporting_flag else None
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace is running"
    if forward_ad._current_level >= 0:
        return "forward-mode AD is active"
    # A share without images still has to take part in the others' statistics.
    return "the input is empty" if x.numel() == 0 and not _synchronises(block) else None


def _parts(block: nn.Module, residual: Residual) -> Parts | str:
    """The children that this call runs, or why it takes the eager path."""
    if torch.compiler.is_compiling():
        if residual.apart:
            return "torch.compile takes the forward of a module that holds its norm or activation as it is written"
        return _resolve(Reader(block), residual)
    parts = recall(block, residual)
    if parts is None:
        reader = Reader(block)
        parts = _resolve(reader, residual)
        if not isinstance(parts, str):
            remember(parts, residual, reader)
    return parts


def _resolve(reader: Reader, residual: Residual) -> Parts | str:
    reason = _hosts_objection(reader, residual.hosts)
    if reason is not None:
        return reason
    spans = []
    for stage in residual.stages:
        conv, norm = _own(reader, residual, stage.conv), _own(reader, residual, stage.norm)
        if conv is None:
            return f"it has no child {stage.conv!r}"
        reason = norm_objection(stage.norm, norm)
        if reason is not None:
            return reason
        act = _activation(reader, stage.act)
        if isinstance(act, str):
            return act
        before, after = _active(reader, stage.before_act), _active(reader, stage.after_act)
        spans.append(Span(conv, norm, before, act, after))  # pyright: ignore[reportArgumentType]  # None is an objection
    act = _activation(reader, residual.act)
    if isinstance(act, str):
        return act
    projection = _projection(reader, residual)
    if isinstance(projection, str):
        return projection
    before_norm, shortcut_norm = projection
    if shortcut_norm is not None and shortcut_norm is spans[-1].norm:
        return "the shortcut's norm is the branch's too"
    gate = None if residual.gate is None else reader.setting(reader.block, residual.gate)
    if gate is MISSING:
        return f"it has no attribute {residual.gate!r}"
    return Parts(
        spans,
        residual.shortcut is not None,
        before_norm,
        shortcut_norm,
        _active(reader, residual.between),
        gate,
        residual.adds_in_place,
        act,
    )


def _active(reader: Reader, paths: tuple[str, ...]) -> list[nn.Module]:
    children = [reader.child(path) for path in paths]
    return [child for child in children if child is not None and not _is_identity(reader, child)]


def _is_identity(reader: Reader, module: nn.Module) -> bool:
    if is_hooked(module):
        return False
    return type(module) is nn.Identity or (type(module) is nn.Sequential and not reader.children(module))


def _activation(reader: Reader, act: str | Activation | None) -> nn.Module | Activation | str:
    """The catalogue's row, or the child to be called where there is none, or an objection."""
    if act is None:
        return IDENTITY
    if isinstance(act, Activation):
        return act
    child = reader.child(act)
    if child is None:
        return f"it has no child {act!r}"
    if is_hooked(child):
        return f"{act} has hooks or a patched forward"
    for name in settings_of(child):
        reader.setting(child, name)
    return of_module(child) or child


def _own(reader: Reader, residual: Residual, path: str) -> nn.Module | None:
    """A child; without what it holds, where the description names that too."""
    child = reader.child(path)
    return alone(child) if child is not None and path in residual.apart else child


def _projection(reader: Reader, residual: Residual) -> tuple[list[nn.Module], nn.Module | None] | str:
    """The shortcut's modules in order, a last one that is a norm apart; both are empty for the identity."""
    shortcut = residual.shortcut
    if not shortcut:
        return [], None
    if isinstance(shortcut, str):
        whole = reader.child(shortcut)
        if whole is None or _is_identity(reader, whole):
            return [], None
        if type(whole) is not nn.Sequential:
            return [whole], None
        if is_hooked(whole):
            return f"{shortcut} has hooks or a patched forward"
        children = reader.children(whole)
        last = f"{shortcut}.{len(children) - 1}"
    else:
        found = [_own(reader, residual, path) for path in shortcut]
        children = [child for child in found if child is not None]
        if len(children) < len(found):
            return f"it has not all of {', '.join(shortcut)}"
        last = shortcut[-1]
    if len(children) > 1 and norm_objection(last, children[-1]) is None:
        return children[:-1], children[-1]
    if is_hooked(children[-1]):
        return f"{last} has hooks or a patched forward"
    return children, None


def hosts_objection(block: nn.Module, hosts: tuple[Host, ...]) -> str | None:
    """What has changed since the block was described."""
    return _hosts_objection(Reader(block), hosts)


def _hosts_objection(reader: Reader, hosts: tuple[Host, ...]) -> str | None:
    for host in hosts:
        reason = _host_objection(reader, host)
        if reason is not None:
            return reason
    return None


def _host_objection(reader: Reader, host: Host) -> str | None:
    module = reader.block
    if host.path:
        child = reader.child(host.path)
        if child is None or (host.kind is not None and type(child) is not host.kind):
            return f"{host.path} was replaced"
        if is_hooked(child):
            return f"{host.path} has hooks or a patched forward"
        module = child
    if host.children is not None and reader.count(module) != host.children:
        return f"{host.path or 'the block'} has other children than when it was described"
    for name, value in host.attributes:
        if not is_same(reader.setting(module, name), value):
            return f"{name} is not {value!r} any more"
    return None

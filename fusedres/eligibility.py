"""What stands against fusing a block that was described: its state, its class, its place in the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from fusedres import swap
from fusedres.apart import is_norm
from fusedres.modules import is_hooked
from fusedres.report import Code, Objection
from fusedres.residual import Residual
from fusedres.residual import objection as residual_objection
from fusedres.swap import Description

_QUANTIZED = ("torch.ao.", "torch.nn.quantized", "torch.nn.qat", "torch.nn.intrinsic")
_SHARDED = {"FullyShardedDataParallel", "FSDPModule"}


def barrier(module: nn.Module) -> Objection | None:
    """Why neither this module nor anything below it can be fused."""
    if isinstance(module, torch.jit.ScriptModule):
        return Objection(Code.SCRIPTED, "it is compiled to TorchScript; fuse the model before that")
    if isinstance(module, torch.fx.GraphModule):
        return Objection(Code.SCRIPTED, "it is a traced or exported graph; fuse the model before that")
    if any(cls.__name__ == "FullyShardedDataParallel" for cls in type(module).__mro__):
        return Objection(Code.SHARDED, "its parameters are sharded; fuse the model before wrapping it")
    return None


def objection(block: nn.Module, description: Description, references: Mapping[nn.Module, int]) -> Objection | None:
    """Why this block is left alone.

    Args:
        references: how many places of the model hold each module.
    """
    parts = _parts(block, description)
    called = parts if isinstance(description, Residual) else dict(block.named_children())
    found = _class(block) or _data(parts) or _kind(called)
    return found or _sharing(parts, description, references) or _call(block, description)


def _parts(block: nn.Module, description: Description) -> dict[str, nn.Module]:
    """The modules that a description stands for, by path: of a chain, only those in its runs."""
    modules = dict(block.named_modules())
    if isinstance(description, Residual):
        return modules
    stages = [stage for residual in residuals(description) for stage in residual.stages]
    return {path: modules[path] for stage in stages for path in (stage.conv, stage.norm, str(stage.act))}


def _class(block: nn.Module) -> Objection | None:
    if "forward" in block.__dict__:
        return Objection(Code.PATCHED, "its forward was replaced on the instance")
    reason = swap.objection(type(block))
    return None if reason is None else Objection(Code.CLASS, reason)


def _data(parts: Mapping[str, nn.Module]) -> Objection | None:
    for module in parts.values():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.is_meta:
                return Objection(Code.META, "its parameters have no data; fuse after materialising them")
            if type(tensor).__name__ == "DTensor":
                return Objection(Code.SHARDED, "its parameters are sharded; fuse the model before that")
    return None


def _kind(parts: Mapping[str, nn.Module]) -> Objection | None:
    for path, module in parts.items():
        cls = type(module)
        if cls.__module__.startswith(_QUANTIZED):
            return Objection(Code.QUANTIZED, f"{path} is a quantized {cls.__name__}")
        if any(base.__name__ in _SHARDED for base in cls.__mro__):
            return Objection(Code.SHARDED, f"{path or 'it'} is sharded; fuse the model before that")
        hooks = [type(hook) for hook in module._forward_pre_hooks.values()]
        by = [hook.__name__ for hook in hooks if hook.__module__.startswith("torch.nn.utils.")]
        if by or "parametrizations" in module._modules:
            return Objection(Code.PARAMETRIZED, f"{path} computes its weight ({', '.join(by) or 'parametrization'})")
    return None


def _sharing(
    parts: Mapping[str, nn.Module], description: Description, references: Mapping[nn.Module, int]
) -> Objection | None:
    for path, module in parts.items():
        if references[module] > 1 and (not path or _has_state(module)):
            return Objection(Code.SHARED, f"{path or 'it'} is held in {references[module]} places of the model")
    stages = [stage for residual in residuals(description) for stage in residual.stages]
    called = [path for stage in stages for path in (stage.conv, stage.norm)]
    for path in called:
        if called.count(path) > 1:
            return Objection(Code.SHARED, f"{path} is called more than once")
    return None


def _call(block: nn.Module, description: Description) -> Objection | None:
    """What would send every call to the eager path."""
    for residual in residuals(description):
        reason = residual_objection(block, residual)
        if reason is None:
            continue
        children = dict(block.named_modules(remove_duplicate=False))
        if any(stage.norm in children and not is_norm(children[stage.norm]) for stage in residual.stages):
            return Objection(Code.NORM, reason)
        if any(is_hooked(module) for module in block.modules() if module is not block):
            return Objection(Code.HOOKS, reason)
        return Objection(Code.STRUCTURE, reason)
    return None


def _has_state(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None or next(module.buffers(), None) is not None


def residuals(description: Description) -> Iterator[Residual]:
    """The parts of a description that run as fused spans."""
    if isinstance(description, Residual):
        yield description
    else:
        yield from (step for step in description.steps if isinstance(step, Residual))

"""What the executor reads off modules: hooks, and what a batch norm would pass to its op in this call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fusedres.backends import Norm, Window

_HALF = (torch.bfloat16, torch.float16)


def is_hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def is_batch_norm(module: nn.Module) -> bool:
    """Whether the executor can take the module apart as a batch norm."""
    cls = type(module)
    return cls is nn.BatchNorm2d or cls is nn.SyncBatchNorm or _is_frozen(cls)


def _is_frozen(cls: type) -> bool:
    return cls.__name__ == "FrozenBatchNorm2d" and cls.__module__ in (
        "fusedres.apart",
        "torchvision.ops.misc",
        "detectron2.layers.batch_norm",
    )


def norm_objection(path: str, module: nn.Module | None) -> str | None:
    """Why a norm can't be taken apart; it is eager's to call then."""
    if module is None:
        return f"it has no child {path!r}"
    cls = type(module)
    if not is_batch_norm(module):
        return f"{path} is a {cls.__name__}"
    return f"{path} has hooks or a patched forward" if is_hooked(module) else None


def window_of(pool: nn.Module) -> Window | None:
    """A max-pool's windows; None where it does more than take the largest value of each."""
    if type(pool) is not nn.MaxPool2d or is_hooked(pool) or pool.ceil_mode or pool.return_indices:
        return None
    stride = pool.kernel_size if pool.stride is None else pool.stride
    sizes = [size if isinstance(size, tuple) else (size, size) for size in (pool.kernel_size, stride, pool.padding)]
    return Window(*sizes) if pool.dilation in (1, (1, 1)) else None


def member(module: nn.Module, name: str) -> Any:
    """A parameter, buffer or attribute; `nn.Module.__getattr__` takes five times as long to find the first two."""
    parameters = module._parameters
    if name in parameters:
        return parameters[name]
    buffers = module._buffers
    return buffers[name] if name in buffers else getattr(module, name)


def dtypes_fit(dtype: torch.dtype, norm: nn.Module) -> bool:
    """Whether the norm keeps the dtype: it does half activations with fp32 parameters, unless it is frozen."""
    weight = member(norm, "weight")
    if weight is None or weight.dtype == dtype:
        return True
    return dtype in _HALF and weight.dtype == torch.float32 and not _is_frozen(type(norm))


def count_batch(norm: nn.Module | None) -> None:
    """Move num_batches_tracked as the norm's forward does."""
    counter = None if norm is None else _counter(norm)
    if counter is not None:
        counter.add_(1)


def _counter(norm: Any) -> Tensor | None:
    """Of the batches, where this call counts its own."""
    if not norm.training or _is_frozen(type(norm)) or not norm.track_running_stats:
        return None
    return member(norm, "num_batches_tracked")


def norm_of(module: Any) -> Norm:
    """What the module's forward would pass to `torch.nn.functional.batch_norm`, the batch being counted."""
    weight, bias = member(module, "weight"), member(module, "bias")
    mean, var = member(module, "running_mean"), member(module, "running_var")
    if _is_frozen(type(module)):
        return Norm(weight, bias, mean, var, eps=module.eps)
    training, momentum = module.training, module.momentum
    tracks = not training or module.track_running_stats
    if momentum is None:
        counter = _counter(module)
        momentum = 0.0 if counter is None else 1.0 / float(counter)
    return Norm(
        weight,
        bias,
        mean if tracks else None,
        var if tracks else None,
        training or (mean is None and var is None),
        momentum,
        module.eps,
    )

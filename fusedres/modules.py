"""What the executor reads off modules: hooks, and what a batch norm would pass to its op in this call."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

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


def dtypes_fit(dtype: torch.dtype, norm: Any) -> bool:
    """Whether the norm keeps the dtype: it does half activations with fp32 parameters, unless it is frozen."""
    weight = norm.weight
    if weight is None or weight.dtype == dtype:
        return True
    return dtype in _HALF and weight.dtype == torch.float32 and not _is_frozen(type(norm))


def count_batch(norm: Any) -> None:
    """Move num_batches_tracked as the norm's forward does."""
    if norm is not None and _counts(norm):
        norm.num_batches_tracked.add_(1)


def _counts(norm: Any) -> bool:
    if not norm.training or _is_frozen(type(norm)):
        return False
    return norm.track_running_stats and norm.num_batches_tracked is not None


def norm_of(module: Any) -> Norm:
    """What the module's forward would pass to `torch.nn.functional.batch_norm`, the batch being counted."""
    if _is_frozen(type(module)):
        return Norm(module.weight, module.bias, module.running_mean, module.running_var, eps=module.eps)
    mean, var, training = module.running_mean, module.running_var, module.training
    tracks = not training or module.track_running_stats
    momentum = module.momentum
    if momentum is None:
        momentum = 1.0 / float(module.num_batches_tracked) if _counts(module) else 0.0
    return Norm(
        module.weight,
        module.bias,
        mean if tracks else None,
        var if tracks else None,
        training or (mean is None and var is None),
        momentum,
        module.eps,
    )

"""Modules that only multiply a branch, as the gate k of the formula: the product is left to the fused pass.

A row names a class by where it is defined; nothing here imports an optional framework.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Gate:
    """How a module's factor is had.

    Args:
        factor: (module, branch) -> k of shape (1 or N, 1 or C, 1, 1), or None where the module does nothing now.
            Random draws are the module's own: same place, shape and dtype.
        reads: whether the factor depends on the branch's values, which must then exist before it.
    """

    factor: Callable[[Any, Tensor], Tensor | None]
    reads: bool


def _timm_drop_path(module: Any, branch: Tensor) -> Tensor | None:
    if module.drop_prob == 0.0 or not module.training:
        return None
    keep = 1 - module.drop_prob
    factor = branch.new_empty((branch.shape[0], 1, 1, 1)).bernoulli_(keep)
    return factor.div_(keep) if keep > 0.0 and module.scale_by_keep else factor


def _torchvision_stochastic_depth(module: Any, branch: Tensor) -> Tensor | None:
    if module.p == 0.0 or not module.training:
        return None
    keep = 1.0 - module.p
    size = (branch.shape[0] if module.mode == "row" else 1, 1, 1, 1)
    factor = torch.empty(size, dtype=branch.dtype, device=branch.device).bernoulli_(keep)
    return factor.div_(keep) if keep > 0.0 else factor


def _timm_squeeze_excite(module: Any, branch: Tensor) -> Tensor | None:
    squeezed = branch.mean((2, 3), keepdim=True)
    if module.add_maxpool:
        squeezed = 0.5 * squeezed + 0.5 * branch.amax((2, 3), keepdim=True)
    return module.gate(module.fc2(module.act(module.bn(module.fc1(squeezed)))))


GATES = {
    ("timm.layers.drop", "DropPath"): Gate(_timm_drop_path, reads=False),
    ("torchvision.ops.stochastic_depth", "StochasticDepth"): Gate(_torchvision_stochastic_depth, reads=False),
    ("timm.layers.squeeze_excite", "SEModule"): Gate(_timm_squeeze_excite, reads=True),
}


def of_module(module: nn.Module) -> Gate | None:
    """The row of exactly this class, or None."""
    cls = type(module)
    return GATES.get((cls.__module__, cls.__name__))

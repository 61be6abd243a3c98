"""Modules that hold what follows them: a convolution with its norm, a norm with its activation.

A description names what such a module holds beside the module itself, and has the module among its hosts: its own
forward is passed over then. What is left of it is its own operation, which `alone` gives.
"""

from __future__ import annotations

from torch import Tensor, nn

from fusedres.modules import is_batch_norm


class FrozenBatchNorm2d(nn.Module):
    """What timm's FrozenBatchNormAct2d does before its activation."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = (
            t.reshape(1, -1, 1, 1) for t in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        scale = weight * (var + self.eps).rsqrt()
        return x * scale + (bias - mean * scale)


# by where they are defined; nothing here imports an optional framework
_NORM_ACTS: dict[tuple[str, str], type[nn.Module]] = {
    ("timm.layers.norm_act", "BatchNormAct2d"): nn.BatchNorm2d,
    ("timm.layers.norm_act", "SyncBatchNormAct"): nn.SyncBatchNorm,
    ("timm.layers.norm_act", "FrozenBatchNormAct2d"): FrozenBatchNorm2d,
}


def _norm_of(module: nn.Module) -> type[nn.Module] | None:
    cls = type(module)
    return _NORM_ACTS.get((cls.__module__, cls.__name__))


def is_norm_act(module: nn.Module) -> bool:
    """Whether the module is a batch norm that calls its children `drop` and `act` afterwards."""
    return _norm_of(module) is not None


def is_norm(module: nn.Module) -> bool:
    """Whether the module is a batch norm, with or without an activation."""
    return is_batch_norm(module) or is_norm_act(module)


def alone(module: nn.Module) -> nn.Module:
    """The module without what it holds: its own state, the very same attributes, under the class of its operation."""
    own = _norm_of(module) or (nn.Conv2d if isinstance(module, nn.Conv2d) else type(module))
    if type(module) is own:
        return module
    view = own.__new__(own)
    object.__setattr__(view, "__dict__", module.__dict__)
    return view

"""What a plan was made from, and whether it still is that: one look a call, all of it comparisons of lists."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

from torch import nn

from fusedres.epilogue import of_module
from fusedres.modules import is_batch_norm
from fusedres.residual import Host, hosts_objection

Hosts = Sequence[tuple[nn.Module | None, tuple[Host, ...]]]

_GEOMETRY = attrgetter("stride", "padding", "dilation", "groups", "padding_mode")


class Watch:
    """The children, hooks, modes, settings, parameters and buffers of a module as they are now.

    It holds everything below the module, but not the module: a plan must not keep its own module alive. A tensor is
    known by identity, address and version, so an optimiser's step, a loaded state_dict and a move are seen; a write
    through `.data` that leaves the address alone has no version, and is not.
    """

    def __init__(self, root: nn.Module, hosts: Hosts) -> None:
        modules = list(root.modules())
        self._below = modules[1:]
        self._children = [module._modules for module in modules]
        self._vars = [module.__dict__ for module in self._below]
        self._hooks = [
            hooks
            for module in self._below
            for hooks in (
                module._forward_hooks,
                module._forward_pre_hooks,
                module._backward_hooks,
                module._backward_pre_hooks,
            )
        ]
        self._convs = [module for module in self._below if isinstance(module, nn.Conv2d)]
        self._norms = [module for module in self._below if is_batch_norm(module)]
        self._acts = [module for module in self._below if isinstance(module, nn.LeakyReLU | nn.GELU)]
        self._hosts = hosts
        self._tensors = [tensors for module in modules for tensors in (module._parameters, module._buffers)]
        self._seen = self._look(root)

    def is_unchanged(self, root: nn.Module) -> bool:
        """Whether all is as it was when the watch began."""
        return self._look(root) == self._seen

    def _look(self, root: nn.Module) -> tuple[list[object], ...]:
        below = self._below
        return (
            [id(child) for children in self._children for child in children.values()],
            [module.__class__ for module in below],
            [module.training for module in below],
            [True for hooks in self._hooks if hooks],
            [True for names in self._vars if "forward" in names],
            [_GEOMETRY(conv) for conv in self._convs],
            [norm.eps for norm in self._norms],
            [of_module(act) for act in self._acts],
            [hosts_objection(root if module is None else module, hosts) for module, hosts in self._hosts],
            self._states(),
        )

    def _states(self) -> list[object]:
        held = [t for tensors in self._tensors for t in tensors.values() if t is not None]
        try:
            return [(id(t), t._version, t.data_ptr()) for t in held]
        except RuntimeError:  # one made in inference mode has no version: it is never known to be unchanged
            return [object()]

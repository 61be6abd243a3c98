"""What a plan was made from, and whether it still is that: one look a call, all of it comparisons of lists."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

from fusedres.apart import is_norm
from fusedres.epilogue import of_module
from fusedres.residual import Host, hosts_objection

Hosts = Sequence[tuple[nn.Module | None, tuple[Host, ...]]]
Gates = Sequence[tuple[nn.Module | None, str]]

_GEOMETRY = itemgetter("stride", "padding", "dilation", "groups", "padding_mode")
_EPS, _TRAINING, _VERSION = itemgetter("eps"), itemgetter("training"), attrgetter("_version")


class _Steps:
    """The optimizers' steps by number: fused and compiled ones write to parameters without telling their versions."""

    def __init__(self) -> None:
        self.last = 0
        self._of = WeakTensorKeyDictionary()  # parameters, and the last step that moved each

    def note(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        number = self.last + 1
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._of[parameter] = number
        self.last = number

    def moved(self, t: Tensor, since: int) -> bool:
        return (self._of.get(t) or 0) > since


_steps = _Steps()
_listen = cache(lambda: register_optimizer_step_post_hook(_steps.note))


class Watch:
    """The children, hooks, modes, settings, parameters and buffers of a module as they are now.

    It holds everything below the module, but not the module: a plan must not keep its own module alive. A tensor is
    known by identity, address and version, so an optimiser's step, a loaded state_dict and a move are seen; a write
    through `.data` that leaves the address alone has no version, and is not.
    """

    def __init__(self, root: nn.Module, hosts: Hosts, gates: Gates) -> None:
        _listen()
        self._step = _steps.last
        modules = list(root.modules())
        self._below = below = modules[1:]
        self._children = [module._modules for module in modules]
        self._vars = [vars(module) for module in below]
        self._hooks = [hooks for module in below for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._convs = [vars(module) for module in below if isinstance(module, nn.Conv2d)]
        self._norms = [vars(module) for module in below if is_norm(module)]
        self._acts = [module for module in below if isinstance(module, nn.LeakyReLU | nn.GELU)]
        self._hosts, self._gates = hosts, gates
        self._tensors = [tensors for module in modules for tensors in (module._parameters, module._buffers)]
        self._seen, self._named = self._look(root), self._tensors_of(root)
        # Held with their memory: neither identity nor address may come again while they are compared. Counters of
        # batches are among them: a batch norm that trains tells its running statistics' versions nothing.
        self._held = [t for t in self._named if t is not None]
        self._memory = [t.detach() for t in self._held]
        self._states_seen = self._states()

    def is_unchanged(self, root: nn.Module) -> bool:
        """Whether all is as it was when the watch began."""
        return (
            self._look(root) == self._seen
            and self._names_the_same(root)
            and self._states() == self._states_seen
            and self._step_moved_nothing()
        )

    def _names_the_same(self, root: nn.Module) -> bool:
        named = self._tensors_of(root)
        return len(named) == len(self._named) and all(map(is_, named, self._named))

    def _step_moved_nothing(self) -> bool:
        last = _steps.last
        if last != self._step:
            if any(_steps.moved(t, self._step) for t in self._held):
                return False
            self._step = last
        return True

    def _look(self, root: nn.Module) -> tuple[list[object], ...]:
        # Every call pays for this: builtins over lists, no Python for each module.
        return (
            [*chain.from_iterable(map(dict.values, self._children))],
            [*map(type, self._below)],
            [*map(_TRAINING, self._vars)],
            [*map(len, self._hooks)] if any(self._hooks) else [],
            ["forward" for names in self._vars if "forward" in names],
            [*map(_GEOMETRY, self._convs)],
            [*map(_EPS, self._norms)],
            [*map(of_module, self._acts)],
            [hosts_objection(root if module is None else module, hosts) for module, hosts in self._hosts],
            [value for value in self._factors(root) if not isinstance(value, Tensor)],
        )

    def _states(self) -> tuple[list[object], ...]:
        """Of the tensors that were there when the watch began."""
        try:
            return [*map(_VERSION, self._held)], [*map(Tensor.data_ptr, self._held)]
        except RuntimeError:  # one made in inference mode has no version: it is never known to be unchanged
            return ([object()],)

    def _tensors_of(self, root: nn.Module) -> list[Tensor | None]:
        """Parameters, buffers, and factors that are tensors."""
        factors = [value for value in self._factors(root) if isinstance(value, Tensor)]
        return [*chain.from_iterable(map(dict.values, self._tensors)), *factors]

    def _factors(self, root: nn.Module) -> list[object]:
        return [getattr(root if module is None else module, name) for module, name in self._gates]

"""What training keeps for the backward: memory against time, for all models or for one.

    fast   everything that the fastest backward wants
    lean   convolution and block outputs; the normalised activations between them are computed again
    min    also without the output of a block's last convolution, and of its projection's, where they are 1x1

The gradients are the same under each, bit for bit where the kernels are deterministic.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

from torch import nn

_ATTRIBUTE = "fusedres_memory"


class Memory(Enum):
    """A policy."""

    FAST = "fast"
    LEAN = "lean"
    MIN = "min"


_everywhere = Memory.FAST


def of_block(block: nn.Module) -> Memory:
    """The policy for a block in this call."""
    own = block.__dict__.get(_ATTRIBUTE)
    return _everywhere if own is None else Memory(own)


class set_memory:  # noqa: N801  called like a function, as torch.set_grad_enabled is
    """Choose what fused blocks keep for their backward: "fast", "lean" or "min" (see `fusedres.memory`).

    It holds from the call on; as a context manager, until the block of code ends. What `torch.utils.checkpoint` runs
    again in the backward goes by the policy that holds then: let the context last until then, or give the model one.

    Args:
        policy: its name.
        model: the one model that it is for; None is all models without a policy of their own.

    >>> import torch, fusedres
    >>> with fusedres.set_memory("lean"):
    ...     y = fusedres.BasicBlock(8, 8)(torch.randn(2, 8, 4, 4))
    """

    def __init__(self, policy: str, model: nn.Module | None = None) -> None:
        names = [memory.value for memory in Memory]
        if policy not in names:
            raise ValueError(f"policy must be one of {', '.join(names)}; got {policy!r}")
        # A copy or a pickle takes the policy along, and loads where fusedres is absent: hence a plain string.
        self._blocks = [] if model is None else [module for module in model.modules() if module._modules]
        self._before = [block.__dict__.get(_ATTRIBUTE) for block in self._blocks]
        self._everywhere = _everywhere
        self._for_all = model is None
        if self._for_all:
            _set_everywhere(Memory(policy))
        for block in self._blocks:
            block.__dict__[_ATTRIBUTE] = policy

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        if self._for_all:
            _set_everywhere(self._everywhere)
        for block, before in zip(self._blocks, self._before, strict=True):
            if before is None:
                del block.__dict__[_ATTRIBUTE]
            else:
                block.__dict__[_ATTRIBUTE] = before


def _set_everywhere(memory: Memory) -> None:
    global _everywhere
    _everywhere = memory

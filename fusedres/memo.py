"""What a block was resolved to, good for as long as everything that was looked at for it stays as it was.

Looking a block's children up, and at each of them, takes longer than to see that nothing has changed: the same children
in the same order, of the same classes, without hooks, and the same settings. That is compared in every call.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fusedres.modules import is_hooked

_ATTRIBUTE = "_fusedres_memos"
MISSING = object()


class Reader:
    """Looks at a block's modules and settings, and notes at which."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.modules: dict[nn.Module, None] = {}
        self.holders: dict[nn.Module, None] = {}  # whose children were looked up by name
        self.sequences: dict[nn.Module, None] = {}  # whose children were taken in order
        self.settings: list[tuple[nn.Module, str, object]] = []

    def child(self, path: str) -> nn.Module | None:
        """The module of that path, which is not empty; None where there is none."""
        child: nn.Module | None = self.block
        for name in path.split("."):
            if child is None:
                return None
            self.holders[child] = None
            child = child._modules.get(name)
        if child is not None:
            self.modules[child] = None
        return child

    def children(self, module: nn.Module) -> list[nn.Module]:
        """A module's own children, in order."""
        self.sequences[module] = None
        children = [child for child in module._modules.values() if child is not None]
        self.modules.update(dict.fromkeys(children))
        return children

    def count(self, module: nn.Module) -> int:
        """How many children a module has, absent ones too."""
        self.holders[module] = None
        return len(module._modules)

    def setting(self, module: nn.Module, name: str) -> Any:
        """An attribute's value; MISSING where there is none."""
        value = getattr(module, name, MISSING)
        self.settings.append((module, name, value))
        return value


class Memo:
    """An answer about a block, and what it was read from.

    What `holds` does is written out, because every call of every block pays for it.
    """

    __slots__ = ("_block", "_children", "_classes", "_key", "_modules", "_sequences", "_settings", "_states", "answer")

    def __init__(self, answer: Any, key: object, reader: Reader) -> None:
        self.answer = answer
        self._key = key  # kept alive, because it is found by its id
        self._block = reader.block
        self._modules, self._settings = [*reader.modules], reader.settings
        self._states = [module.__dict__ for module in self._modules]
        self._classes = [*map(type, self._modules)]
        self._children = [(holder, dict(holder._modules)) for holder in reader.holders]
        self._sequences = [(holder, [*holder._modules.values()]) for holder in reader.sequences]

    def holds(self, block: nn.Module) -> bool:
        """Whether nothing has changed; a copy of a block's `__dict__` holds another block's memo."""
        if block is not self._block or [*map(type, self._modules)] != self._classes:
            return False
        for holder, children in self._children:
            if holder._modules != children:
                return False
        for holder, children in self._sequences:
            if [*holder._modules.values()] != children:
                return False
        for module, name, before in self._settings:
            value = getattr(module, name, MISSING)
            if value is not before and not is_same(value, before):
                return False
        for state in self._states:  # is_hooked
            if (
                state["_forward_hooks"]
                or state["_forward_pre_hooks"]
                or state["_backward_hooks"]
                or state["_backward_pre_hooks"]
                or "forward" in state
            ):
                return False
        return True


def is_same(value: object, before: object) -> bool:
    """Whether a setting is what it was: tensors by identity, anything else also by equality."""
    if value is before:
        return True
    return type(value) is type(before) and not isinstance(value, Tensor) and bool(value == before)


def recall(block: nn.Module, key: object) -> Any:
    """The answer about `key` that was remembered, or None where there is none or it doesn't hold any more."""
    memos = block.__dict__.get(_ATTRIBUTE)
    memo = None if memos is None else memos.get(id(key))
    return memo.answer if memo is not None and memo.holds(block) else None


def remember(answer: Any, key: object, reader: Reader) -> None:
    """Keep an answer, unless a module that it was read from has hooks: those may go as they came."""
    if not any(map(is_hooked, reader.modules)):
        reader.block.__dict__.setdefault(_ATTRIBUTE, {})[id(key)] = Memo(answer, key, reader)


def forget(block: nn.Module) -> None:
    """Leave no trace: a block that is copied or saved must not take along what it found out about itself."""
    block.__dict__.pop(_ATTRIBUTE, None)

"""The class of a fused module: a subclass of its own class whose forward runs the description.

Only `__class__` changes. Parameters, children, hooks and everything else in the instance stay as they are; the
description lives in the class. A copy is fused too. A pickle names the original class: it loads unfused, with or
without fusedres.
"""

from __future__ import annotations

import copy
from abc import ABCMeta
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from fusedres.memo import forget
from fusedres.residual import Host, Residual, hosts_objection, run


@dataclass(frozen=True)
class Call:
    """A function, or a method's name, and what it is called with after the tensor."""

    target: str | Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...]

    def __call__(self, x: Tensor) -> Tensor:
        target = getattr(type(x), self.target) if isinstance(self.target, str) else self.target
        return target(x, *self.arguments, **dict(self.keywords))


@dataclass(frozen=True)
class Runs:
    """A module that calls one thing after the other, some of them in fused runs.

    Args:
        steps: what is called in training, in order: a child's name, a function, the description of a run.
        steps_in_eval: the same in eval mode.
        names: all children; with others than these the module runs as it always did.
        hosts: the settings that its forward depends on.
    """

    steps: tuple[str | Call | Residual, ...]
    steps_in_eval: tuple[str | Call | Residual, ...]
    names: tuple[str, ...]
    hosts: tuple[Host, ...] = ()


Description = Residual | Runs


class Swapped:
    """What the classes of modules whose class was swapped have in common.

    Args:
        original: the class that the module had.
    """

    original: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        forget(self)  # pyright: ignore[reportArgumentType]
        # By protocol 0, because pickle refuses a later protocol's constructor for any class but the object's own.
        reduced = super().__reduce_ex__(0)
        if isinstance(reduced, str):
            return reduced
        function, arguments, *state = reduced
        cls = type(self)
        return (function, tuple(class_of(self) if argument is cls else argument for argument in arguments), *state)

    def __copy__(self) -> Any:
        return self._copied("__copy__", None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self._copied("__deepcopy__", memo)

    def _copied(self, method: str, memo: dict[int, Any] | None) -> Any:
        """Copied as its original class copies itself, and swapped like it; meanwhile it is called as ever."""
        forget(self)  # pyright: ignore[reportArgumentType]
        own = getattr(class_of(self), method, None)
        if own is not None:
            twin = own(self) if memo is None else own(self, memo)
        else:
            twin = copy._reconstruct(self, memo, *super().__reduce_ex__(4))  # pyright: ignore[reportAttributeAccessIssue]
        twin.__class__ = type(self)
        return twin


class Fused(Swapped):
    """What the classes of fused modules have in common.

    Args:
        description: what forward runs.
        family: what the module was recognised as.
    """

    description: Description
    family: str


# (module, x, the module's own forward) -> y
Server = Callable[[nn.Module, Tensor, Callable[[Tensor], Tensor]], Tensor]


class Optimized(Swapped):
    """What the classes of optimized modules have in common; `original` may be the class of a fused module."""

    server: Server


def class_of(module: Any) -> Any:
    """The class that a module was written with, whatever was swapped since."""
    cls = type(module)
    while issubclass(cls, Swapped):
        cls = cls.original
    return cls


def objection(original: type[nn.Module]) -> str | None:
    """Why a class can't be subclassed without anyone noticing."""
    if not isinstance(original.forward, FunctionType):
        return f"{original.__name__}.forward is a {type(original.forward).__name__}, not a function"
    if type(original) not in (type, ABCMeta):
        return f"{original.__name__} has the metaclass {type(original).__name__}, which a new subclass might upset"
    if hasattr(original.__init_subclass__, "__func__"):
        return f"{original.__name__} defines __init_subclass__, which a new subclass would call"
    return None


def swap(module: nn.Module, description: Description, family: str) -> None:
    """Let the module run its description."""
    _change_below(module, lambda cls: _fused_class(cls, description, family))


def restore(module: nn.Module) -> None:
    """Give a fused module its class back."""
    if isinstance(module, Fused):
        forget(module)
        _change_below(module, lambda cls: cls.original)  # pyright: ignore[reportAttributeAccessIssue]


def _change_below(module: nn.Module, change: Callable[[type[nn.Module]], type[nn.Module]]) -> None:
    """Change a module's class, or what is optimized of it."""
    cls: Any = type(module)
    module.__class__ = _optimized_class(change(cls.original), cls.server) if issubclass(cls, Optimized) else change(cls)


_subclasses: dict[tuple[object, ...], type[nn.Module]] = {}


def _fused_class(original: type[nn.Module], description: Description, family: str) -> type[nn.Module]:
    key = original, description, family
    if key not in _subclasses:
        if isinstance(description, Residual):
            forward = _block_forward(original.forward, description)
        else:
            forward = _runs_forward(original.forward, description)
        _subclasses[key] = _subclass(Fused, original, forward, description=description, family=family)
    return _subclasses[key]


def _optimized_class(original: type[nn.Module], server: Server) -> type[nn.Module]:
    key = original, server
    if key not in _subclasses:
        forward = _optimized_forward(original.forward, server)
        _subclasses[key] = _subclass(Optimized, original, forward, server=staticmethod(server))
    return _subclasses[key]


def _subclass(kind: type[Swapped], original: type[nn.Module], forward: FunctionType, **members: object) -> Any:
    """A class that nobody tells from the original by its looks."""
    members |= {
        "original": original,
        "forward": _in_the_name_of(original.forward, forward),
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    metaclass: Any = type(original)
    return metaclass(original.__name__, (kind, original), members)


def _block_forward(original: Callable[..., Any], residual: Residual, run: Any = run, partial: Any = partial) -> Any:
    """Names are arguments here, because the function is to have the original's globals."""

    def forward(self, *args, **kwargs):
        if len(args) != 1 or kwargs:
            return original(self, *args, **kwargs)
        return run(self, residual, args[0], partial(original, self))

    return forward


def _optimized_forward(original: Callable[..., Any], server: Server, partial: Any = partial) -> Any:
    def forward(self, *args, **kwargs):
        if len(args) != 1 or kwargs:
            return original(self, *args, **kwargs)
        return server(self, args[0], partial(original, self))

    return forward


def _run_steps(module: nn.Module, steps: tuple[str | Call | Residual, ...], x: Tensor) -> Tensor:
    for step in steps:
        if isinstance(step, Residual):
            x = run(module, step, x, partial(_run_children, module, step))
        elif isinstance(step, Call):
            x = step(x)
        else:
            x = module._modules[step](x)  # pyright: ignore[reportOptionalCall]  # Sequential calls None too
    return x


def _run_children(module: nn.Module, residual: Residual, x: Tensor) -> Tensor:
    for name in children_of(residual):
        x = module._modules[name](x)  # pyright: ignore[reportOptionalCall]
    return x


def children_of(run: Residual) -> list[str]:
    """The children that a run stands for; what one of them holds is called by it."""
    paths = [path for stage in run.stages for path in (stage.conv, stage.norm, str(stage.act), *stage.after_act)]
    return [path for path in paths if "." not in path]


def _runs_forward(
    original: Callable[..., Any], runs: Runs, run_steps: Any = _run_steps, changed: Any = hosts_objection
) -> Any:
    def forward(self, *args, **kwargs):
        if len(args) != 1 or kwargs or tuple(self._modules) != runs.names or changed(self, runs.hosts):
            return original(self, *args, **kwargs)
        return run_steps(self, runs.steps if self.training else runs.steps_in_eval, args[0])

    return forward


def optimize(module: nn.Module, server: Server) -> None:
    """Let `server` compute what the module is called with, or leave it to the module's own forward."""
    if not isinstance(module, Optimized):
        module.__class__ = _optimized_class(type(module), server)


def unoptimize(module: nn.Module) -> None:
    """Give an optimized module its class back."""
    if isinstance(module, Optimized):
        module.__class__ = module.original  # pyright: ignore[reportAttributeAccessIssue]


def _in_the_name_of(original: Callable[..., Any], forward: FunctionType) -> FunctionType:
    """`forward`, to be read as the original: inspect and torch.jit.script unwrap it, and look names up as it does."""
    function = FunctionType(
        forward.__code__, original.__globals__, original.__name__, forward.__defaults__, forward.__closure__
    )
    function.__wrapped__ = original  # pyright: ignore[reportFunctionMemberAccess]
    function.__module__, function.__qualname__ = original.__module__, original.__qualname__
    function.__doc__ = original.__doc__
    return function

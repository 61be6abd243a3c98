"""A block's forward as a graph: run on a symbol, children called but not entered unless they hold a batch norm."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from functools import cache
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from fusedres import swap
from fusedres.apart import is_norm, is_norm_act
from fusedres.modules import is_batch_norm


class UnprovenError(Exception):
    """Why a forward is not, or can't be shown to be, the formula."""


class Trace:
    """One run of a forward on a symbol. The block is not touched: a stand-in with its children and attributes runs.

    Args:
        block: what is run.
        training: the mode that its forward sees.
        enters: whether children that hold a batch norm are entered.
    """

    def __init__(self, block: nn.Module, training: bool, *, enters: bool = True) -> None:
        self.block = block
        tracer = _Tracer(training, enters)
        root = tracer.enter("", block)
        try:
            self.graph = tracer.trace(root)
        except UnprovenError:
            raise
        except Exception as error:  # whatever a forward makes of a symbol
            first_line = str(error).strip().partition("\n")[0]
            raise UnprovenError(f"its forward can't be traced: {first_line}") from error
        self._entered = tracer.entered

    def entered(self) -> Iterator[tuple[str, nn.Module, tuple[tuple[str, object], ...]]]:
        """Each module whose forward was run: path, module, and the settings that were read of it."""
        for path, stand_in in self._entered.items():
            module = self.block.get_submodule(path)
            yield path, module, tuple(_settings(module, stand_in.__dict__[_READS], path))


class _Symbol(fx.Proxy):
    """Tells `a += b` from `a + b`, which fx takes for the same."""

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __imul__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})


class _Tracer(fx.Tracer):
    def __init__(self, training: bool, enters: bool) -> None:
        super().__init__()
        self._training, self._enters = training, enters
        self.entered: dict[str, Any] = {}

    def enter(self, path: str, module: nn.Module) -> Any:
        if path not in self.entered:
            cls = swap.class_of(module)
            reason = swap.objection(cls)
            if reason is not None:
                raise UnprovenError(reason)
            stand_in = object.__new__(_stand_in_class(cls))
            stand_in.__dict__.update(module.__dict__, training=self._training, **{_READS: {}})
            self.entered[path] = stand_in
        return self.entered[path]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Symbol(node, self)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        try:
            path = self.path_of_module(m)
        except NameError:  # made in the forward, as in nn.ReLU()(x)
            return m.forward(*args, **kwargs)
        if not self._enters or _is_leaf(m):
            return self.create_proxy("call_module", path, args, kwargs)
        if is_norm_act(m):
            self.enter(path, m)
            return self._norm_then_act(path, m, args, kwargs)
        return self.enter(path, m).forward(*args, **kwargs)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Any:
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        proxy.node.meta[GIVEN] = args  # the very objects, of which the node keeps copies
        return proxy

    def _norm_then_act(self, path: str, m: nn.Module, args: Any, kwargs: Any) -> Any:
        """What the forward does, whose own arithmetic on buffers is no formula to match: norm, drop, act."""
        y: Any = self.create_proxy("call_module", path, args, kwargs)
        for child in (m._modules.get("drop"), m._modules.get("act")):
            y = y if child is None else child(y)
        return y

    def to_bool(self, obj: fx.Proxy) -> bool:
        """`x.numel() == 0`: no, because a call with an empty tensor takes the eager path."""
        node = obj.node
        if node.target is operator.eq and isinstance(node.args[0], fx.Node) and node.args[1] == 0:
            size = node.args[0]
            if size.op == "call_method" and size.target == "numel" and len(size.users) == 1:
                for asked in (node, size):
                    self.graph.erase_node(asked)
                return False
        return super().to_bool(obj)


def _is_leaf(module: nn.Module) -> bool:
    if is_batch_norm(module):
        return True
    standard = type(module).__module__.startswith("torch.nn.") and not isinstance(module, nn.Sequential)
    return standard or not any(map(is_norm, module.modules()))


GIVEN = "given"
_READS = "_attributes_read"
_INTERNALS = frozenset(vars(nn.Module())) | {"__dict__", "__class__", _READS}


@cache
def _stand_in_class(cls: type[nn.Module]) -> type[nn.Module]:
    """`cls`, noting which attributes are read."""

    def read(self: Any, name: str) -> Any:
        if name not in _INTERNALS:
            object.__getattribute__(self, "__dict__")[_READS][name] = None
        return cls.__getattribute__(self, name)

    def forward(self: Any, x: Any) -> Any:
        return cls.forward(self, x)

    members = {"__getattribute__": read, "forward": forward, "__module__": __name__}
    return cast(Any, type(cls))(cls.__name__, (cls,), members)


_SETTING = (type(None), bool, int, float, str, torch.dtype, FunctionType, BuiltinFunctionType, type)


def _settings(module: nn.Module, names: dict[str, None], path: str) -> Iterator[tuple[str, object]]:
    """What a forward read that is neither a child, a tensor nor a method."""
    for name in names:
        value = getattr(module, name)
        if isinstance(value, nn.Module | Tensor | MethodType):
            continue
        if not all(isinstance(element, _SETTING) for element in (value if isinstance(value, tuple) else (value,))):
            where = f"{path}.{name}" if path else name
            raise UnprovenError(f"it reads {where}, a {type(value).__name__}, which may change")
        yield name, value

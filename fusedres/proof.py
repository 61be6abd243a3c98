"""The proof that a block's forward is the formula: its traced graph, matched node by node.

`prove` traces the forward in training and in eval mode. Every node of both graphs has to have its place in one
`Residual`, or the block is not described. The Python attributes that the forward read go into the description's hosts,
and are compared again in every call. What a trace can't see: module globals, and a forward that asks for the global
state of PyTorch.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fusedres.apart import is_norm
from fusedres.epilogue import CATALOGUE, IDENTITY, Activation, find, of_module
from fusedres.report import Code, Objection
from fusedres.residual import Host, Residual, Stage
from fusedres.tracing import GIVEN, Trace, UnprovenError


def prove(block: nn.Module) -> Residual | Objection:
    """The block's description, if its forward is provably that; else what stands against it."""
    try:
        training, evaluating = (_Match(Trace(block, mode)).residual() for mode in (True, False))
    except UnprovenError as unproven:
        return Objection(Code.UNPROVEN, str(unproven))
    if training != evaluating:
        return Objection(Code.UNPROVEN, "its forward does one thing in training and another in eval mode")
    return training


_ACTIVATIONS: dict[Any, str] = {
    **{row.formula: row.name for row in CATALOGUE if isinstance(row.formula, FunctionType | BuiltinFunctionType)},
    F.relu_: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    "relu": "relu",
    "relu_": "relu",
}
_ACTIVATION_DEFAULTS = {"approximate": "none", "negative_slope": 0.01}


def activation_of(target: object, keywords: Mapping[str, object]) -> Activation | None:
    """The catalogue's row that a function, or a method's name, is with these keywords."""
    name = _ACTIVATIONS.get(target)
    settings = {key: value for key, value in keywords.items() if key != "inplace"}
    fits = all(_ACTIVATION_DEFAULTS.get(key) == value for key, value in settings.items())
    return find(name) if name is not None and fits else None


_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
_IN_PLACE_ADDITIONS = (operator.iadd, "add_")
_PRODUCTS = (operator.mul, torch.mul, "mul")
# Neither random nor in place: it doesn't matter when they are called.
_TIMELESS = (nn.Conv2d, nn.BatchNorm2d, nn.AvgPool2d, nn.MaxPool2d, nn.Identity)


@dataclass(frozen=True)
class _Step:
    """One node that takes one tensor to another: by a child, a function of the catalogue or a gate."""

    node: fx.Node
    child: str | None = None
    module: nn.Module | None = None
    function: Activation | None = None
    gate: str | None = None

    @property
    def is_norm(self) -> bool:
        return self.module is not None and is_norm(self.module)

    @property
    def is_activation(self) -> bool:
        if self.module is None:
            return self.function is not None
        return of_module(self.module) not in (None, IDENTITY)


class _Match:
    """One trace of a block, matched from its output back to its input."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._block = trace.block
        self._nodes = list(trace.graph.nodes)
        self._input = self._nodes[0]
        self._matched = {self._input}
        self._convolutions: dict[str, fx.Node] = {}  # calls of `F.conv2d`, by the module whose convolution they are

    def residual(self) -> Residual:
        output = self._nodes[-1]
        result = output.args[0]
        if not isinstance(result, fx.Node):
            raise UnprovenError("it returns something other than one tensor")
        self._matched.add(output)
        tail, addition = self._back(result)
        found = Residual(_stages(tail)) if addition is None else self._with_shortcut(tail, addition)
        if addition is None and all(stage.act is None for stage in found.stages):
            raise UnprovenError("a batch norm with no activation and no addition after it leaves nothing to fuse")
        for node in self._nodes:
            if node not in self._matched:
                raise UnprovenError(f"it also calls {_name(node)}")
        return replace(found, hosts=self._hosts(found))

    def _with_shortcut(self, tail: list[_Step], addition: fx.Node) -> Residual:
        if len(tail) > 1 or any(step.gate is not None for step in tail):
            raise UnprovenError(f"{_name(tail[-1].node)} comes after the addition's activation")
        in_place = addition.target in _IN_PLACE_ADDITIONS
        branch, shortcut = self._operand(addition, 0), self._operand(addition, 1)
        if _weight(shortcut) > _weight(branch):
            if in_place:
                raise UnprovenError("it adds to its shortcut in place")
            branch, shortcut = shortcut, branch
        self._check_order(branch, shortcut)
        gate = None
        if branch and branch[-1].gate is not None:
            *branch, last = branch
            gate = last.gate
        end = max((index for index, step in enumerate(branch) if step.is_norm), default=-1)
        act = tail[0] if tail else _Step(addition)
        return Residual(
            _stages(branch[: end + 1]),
            shortcut=self._shortcut(_children(shortcut)),
            between=_children(branch[end + 1 :]),
            gate=gate,
            act=act.child or act.function,
            adds_in_place=in_place,
        )

    def _operand(self, addition: fx.Node, index: int) -> list[_Step]:
        node = addition.args[index]
        if not isinstance(node, fx.Node):
            raise UnprovenError("it adds a constant")
        steps, further = self._back(node)
        if further is not None:
            raise UnprovenError("it has more than one addition")
        return steps

    def _back(self, node: fx.Node) -> tuple[list[_Step], fx.Node | None]:
        """The steps that end in `node`, in order, and the addition they begin at; None for the block's input."""
        steps: list[_Step] = []
        while node is not self._input:
            if len(node.users) != 1:
                raise UnprovenError(f"the result of {_name(node)} is used more than once")
            self._matched.add(node)
            if _calls(node, _ADDITIONS, 2):
                return steps[::-1], node
            step, node = self._step(node)
            steps.append(step)
        return steps[::-1], None

    def _step(self, node: fx.Node) -> tuple[_Step, fx.Node]:
        if _calls(node, _PRODUCTS, 2):
            return self._gate(node)
        if _calls(node, (F.conv2d,), 7):
            return self._convolution(node)
        operand = node.args[0] if len(node.args) == 1 else None
        if isinstance(operand, fx.Node):
            if node.op == "call_module" and not node.kwargs:
                path = str(node.target)
                return _Step(node, path, self._block.get_submodule(path)), operand
            if node.op in ("call_function", "call_method"):
                function = activation_of(node.target, node.kwargs)
                if function is not None:
                    return _Step(node, function=function), operand
        raise UnprovenError(f"{_name(node)} is no part of the formula")

    def _convolution(self, node: fx.Node) -> tuple[_Step, fx.Node]:
        """`F.conv2d` of everything that one convolution has: the convolution, without what else its forward does."""
        operand, weight, bias, *geometry = node.args
        if isinstance(operand, fx.Node) and isinstance(weight, fx.Node) and weight.op == "get_attr":
            path = str(weight.target).removesuffix(".weight")
            conv = self._block.get_submodule(path) if path != weight.target else None
            if isinstance(conv, nn.Conv2d) and geometry == [getattr(conv, name) for name in _GEOMETRY]:
                named = bias.target == f"{path}.bias" if isinstance(bias, fx.Node) else bias is conv.bias
                if named and conv.padding_mode == "zeros":
                    self._matched.update(parameter for parameter in (weight, bias) if isinstance(parameter, fx.Node))
                    self._convolutions[path] = node
                    return _Step(node, path, conv), operand
        raise UnprovenError(f"{_name(node)} is not of the parameters and settings of one convolution")

    def _gate(self, node: fx.Node) -> tuple[_Step, fx.Node]:
        for gate, operand in (node.args, node.args[::-1]):
            if isinstance(gate, fx.Node) and gate.op == "get_attr" and isinstance(operand, fx.Node):
                value = getattr(self._block, str(gate.target), None)
                if isinstance(value, Tensor) and _is_gate(value):
                    self._matched.add(gate)
                    return _Step(node, gate=str(gate.target)), operand
        raise UnprovenError(f"{_name(node)} is not by a tensor of one value or of shape (1, C, 1, 1) kept on the block")

    def _shortcut(self, children: tuple[str, ...]) -> str | tuple[str, ...]:
        """One path, where it's one child or all of one Sequential; several, where no module holds just them."""
        if len(children) < 2:
            return "".join(children)
        parent = children[0].rpartition(".")[0]
        holder = self._block.get_submodule(parent)
        if type(holder) is nn.Sequential and tuple(f"{parent}.{name}" for name in holder._modules) == children:
            return parent
        return children

    def _check_order(self, branch: list[_Step], shortcut: list[_Step]) -> None:
        """The executor runs the branch first; where eager doesn't, that must not matter."""
        if not branch or not shortcut:
            return
        if self._nodes.index(shortcut[0].node) > self._nodes.index(branch[-1].node):
            return
        for step in (*shortcut, branch[0]):
            if not (step.is_norm or isinstance(step.module, _TIMELESS) or _is_empty(step.module)):
                raise UnprovenError(f"{_name(step.node)} and the branch could not change their order unnoticed")

    def _hosts(self, residual: Residual) -> tuple[Host, ...]:
        hosts = {}
        for path, module, settings in self._trace.entered():
            if path:
                hosts[path] = Host(path, type(module), len(module._modules), settings)
            elif settings:
                hosts[path] = Host(path, attributes=settings)
        for path, node in self._convolutions.items():
            conv = self._block.get_submodule(path)
            settings = dict(hosts[path].attributes) if path in hosts else {}
            settings.pop("bias", None)  # None, and matched
            for name, given in zip(_GEOMETRY, node.meta[GIVEN][3:], strict=True):
                if name in settings and given is settings[name]:
                    del settings[name]  # handed on as it is, as the convolution itself does
                else:
                    settings[name] = getattr(conv, name)
            settings["padding_mode"] = conv.padding_mode
            hosts[path] = Host(path, type(conv), len(conv._modules), tuple(settings.items()))
        if isinstance(residual.shortcut, str) and residual.shortcut:
            shortcut = self._block.get_submodule(residual.shortcut)
            if type(shortcut) is nn.Sequential:  # what is appended to it has not been proven
                hosts[residual.shortcut] = Host(residual.shortcut, nn.Sequential, len(shortcut._modules))
        return tuple(hosts.values())


_GEOMETRY = ("stride", "padding", "dilation", "groups")  # what `F.conv2d` takes after the parameters


def _is_empty(module: nn.Module | None) -> bool:
    return type(module) is nn.Sequential and len(module) == 0


def _stages(steps: list[_Step]) -> tuple[Stage, ...]:
    """conv -> norm -> [before_act] -> act -> [after_act], as often as it comes."""
    norms = [index for index, step in enumerate(steps) if step.is_norm]
    if not norms or norms[0] != 1:
        raise UnprovenError("it does not begin with one convolution and its batch norm")
    stages = []
    for norm, following in zip(norms, [*norms[1:], len(steps) + 1], strict=True):
        conv, between = norm - 1, steps[norm + 1 : following - 1]
        if following - norm < 2:
            raise UnprovenError("a batch norm follows a batch norm")
        conv, norm = _children(steps[conv : norm + 1])
        act = next((index for index, step in enumerate(between) if step.is_activation), None)
        if act is None:
            stages.append(Stage(conv, norm, after_act=_children(between)))
        else:
            before, step, after = between[:act], between[act], between[act + 1 :]
            stages.append(Stage(conv, norm, step.child or step.function, _children(before), _children(after)))
    return tuple(stages)


def _children(steps: list[_Step]) -> tuple[str, ...]:
    for step in steps:
        if step.child is None:
            raise UnprovenError(f"{_name(step.node)} stands where only a child can")
    return tuple(str(step.child) for step in steps)


def _weight(steps: list[_Step]) -> tuple[int, int]:
    """Of the two sides of an addition, the heavier is the branch."""
    return sum(step.is_norm for step in steps), len(steps)


def _is_gate(value: Tensor) -> bool:
    if value.dim() <= 1:
        return value.numel() == 1
    return value.dim() == 4 and value.shape[0] == 1 and value.shape[2:] == (1, 1)


def _calls(node: fx.Node, targets: tuple[Any, ...], arguments: int) -> bool:
    called = node.op in ("call_function", "call_method") and node.target in targets
    return called and len(node.args) == arguments and not node.kwargs


def _name(node: fx.Node) -> str:
    """A node in the words of the forward."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))

"""Runs of conv -> norm -> act where children are called one after the other: in Sequentials and networks' stems."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

from torch import fx, nn

from fusedres.apart import is_norm, is_norm_act
from fusedres.epilogue import IDENTITY, of_module
from fusedres.modules import is_batch_norm
from fusedres.residual import Host, Residual, Stage
from fusedres.swap import Call, Runs, children_of
from fusedres.tracing import Trace, UnprovenError

Step = str | Call


def of_sequential(sequential: nn.Sequential) -> Runs | None:
    """The runs among a Sequential's children; None where there are none."""
    steps = _steps(sequential, list(sequential._modules))
    return _runs(sequential, steps, steps, ())


def of_forward(module: nn.Module) -> Runs | None:
    """The runs in a forward that is provably a chain of children and functions; None where it isn't, or has none."""
    if not any(child is not None and is_norm(child) for child in module._modules.values()):
        return None
    try:
        (training, hosts), (evaluating, hosts_in_eval) = (of_calls(module, mode) for mode in (True, False))
    except UnprovenError:
        return None
    if any(isinstance(step, str) and "." in step for step in (*training, *evaluating)):
        return None
    return _runs(module, _steps(module, training), _steps(module, evaluating), hosts + hosts_in_eval)


def of_calls(module: nn.Module, training: bool) -> tuple[list[Step], tuple[Host, ...]]:
    """What a forward that is provably a chain calls, in order, and the settings that it read; UnprovenError else."""
    trace = Trace(module, training, enters=False)
    before, *nodes, output = trace.graph.nodes
    steps: list[Step] = []
    for node in nodes:
        if tuple(before.users) != (node,) or node.all_input_nodes != [before] or node.args[:1] != (before,):
            raise UnprovenError(f"{node} is not called on the result before it alone")
        steps.append(_step(node))
        before = node
    if output.args != (before,):
        raise UnprovenError("it returns something other than its last result")
    return steps, tuple(Host("", attributes=settings) for _, _, settings in trace.entered() if settings)


def _step(node: fx.Node) -> Step:
    if node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
        return str(node.target)
    if node.op == "call_module" or not _is_constant((node.args[1:], tuple(node.kwargs.values()))):
        raise UnprovenError(f"{node} can't be called again from its arguments")
    target: str | Callable[..., Any] = node.target
    return Call(target, node.args[1:], tuple(node.kwargs.items()))


def _is_constant(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_constant, value))
    return isinstance(value, type(None) | bool | int | float | str)


def _runs(
    module: nn.Module, training: list[Step | Residual], evaluating: list[Step | Residual], hosts: tuple[Host, ...]
) -> Runs | None:
    found = any(isinstance(step, Residual) for step in training)
    return Runs(tuple(training), tuple(evaluating), tuple(module._modules), hosts) if found else None


def _steps(module: nn.Module, called: Sequence[Step]) -> list[Step | Residual]:
    """What is called, with the description of a run in place of its children and the max-pool after them."""
    steps: list[Step | Residual] = []
    index = 0
    while index < len(called):
        names = list(takewhile(lambda step: isinstance(step, str), called[index : index + 4]))
        run = _run(module, [str(name) for name in names])
        if run is None:
            steps.append(called[index])
            index += 1
        else:
            steps.append(run)
            index += len(children_of(run))
    return steps


def _run(module: nn.Module, names: list[str]) -> Residual | None:
    """conv -> norm -> act, the act a child or the norm's own, where children begin with it; and a max-pool after it."""
    children = [module._modules.get(name) for name in names]
    if len(names) < 2 or children[0] is None or children[1] is None:
        return None
    conv, norm, *rest = names
    hosts: tuple[Host, ...] = ()
    if is_norm_act(children[1]):
        hosts = (Host(norm, type(children[1]), len(children[1]._modules)),)
        before_act, act, activation = (f"{norm}.drop",), f"{norm}.act", children[1]._modules.get("act")
    else:
        before_act, act, activation = (), rest[0] if rest else "", children[2] if rest else None
        rest = rest[1:]
    begins = is_norm_act(children[1]) or is_batch_norm(children[1])
    if not begins or activation is None or of_module(activation) in (None, IDENTITY):
        return None
    pools = bool(rest) and type(module._modules.get(rest[0])) is nn.MaxPool2d
    return Residual((Stage(conv, norm, act, before_act, tuple(rest[:pools])),), hosts=hosts)

"""Runs of conv -> norm -> act where children are called one after the other: in Sequentials and networks' stems."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx, nn

from fusedres.epilogue import IDENTITY, of_module
from fusedres.modules import is_batch_norm
from fusedres.residual import Host, Residual, Stage
from fusedres.swap import Call, Runs
from fusedres.tracing import Trace, UnprovenError

Step = str | Call


def of_sequential(sequential: nn.Sequential) -> Runs | None:
    """The runs among a Sequential's children; None where there are none."""
    steps = _steps(sequential, list(sequential._modules))
    return _runs(sequential, steps, steps, ())


def of_forward(module: nn.Module) -> Runs | None:
    """The runs in a forward that is provably a chain of children and functions; None where it isn't, or has none."""
    if not any(child is not None and is_batch_norm(child) for child in module._modules.values()):
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
    """What is called, with the description of a run in place of its three children and the max-pool after them."""
    steps: list[Step | Residual] = []
    index = 0
    while index < len(called):
        names = [step for step in called[index : index + 3] if isinstance(step, str)]
        if len(names) == 3 and _is_run([module._modules.get(name) for name in names]):
            conv, norm, act = names
            index += 3
            pool = called[index] if index < len(called) else None
            pools = isinstance(pool, str) and type(module._modules.get(pool)) is nn.MaxPool2d
            steps.append(Residual((Stage(conv, norm, act, after_act=(str(pool),) if pools else ()),)))
            index += pools
        else:
            steps.append(called[index])
            index += 1
    return steps


def _is_run(children: list[nn.Module | None]) -> bool:
    conv, norm, act = children
    activates = act is not None and of_module(act) not in (None, IDENTITY)
    return conv is not None and norm is not None and is_batch_norm(norm) and activates

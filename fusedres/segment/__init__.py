"""Which stages of a block can be one differentiable function in this call, and with what.

    z = act(norm(conv(... act(norm(conv(x))))))       a segment
    y = act(norm(conv(z)) + x)                        with an identity shortcut at its end
    y = act(norm(conv(z)) + norm_r(conv_r(x)))        with a projection, both norms in one pass

Where a call can't have that, `fusedres.executor` runs op by op, and a convolution is a function by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusedres import dispatch
from fusedres.backends import Backend, Geometry, Norm, reference
from fusedres.epilogue import IDENTITY
from fusedres.memory import Memory
from fusedres.modules import count_batch, dtypes_fit, is_hooked, member, norm_of
from fusedres.ops import kernels
from fusedres.segment import convolution, operator
from fusedres.segment.function import SegmentFunction, SyncSegmentFunction, apply
from fusedres.segment.plan import NO_NORM, Plan, Step, convolved
from fusedres.segment.requests import computing_dtype, convolution_of, norms_of, requests_of
from fusedres.synchronised import Synchronised, are_joint, group_of


class Link(NamedTuple):
    """conv -> norm -> act, resolved for one call; the convolution is bare."""

    conv: Any
    norm: Any
    act: Any  # an Activation


class End(NamedTuple):
    """What is added before the last activation: the shortcut as it is, or through the projection's conv and norm."""

    shortcut: Tensor
    projection: Link | None


def is_bare(conv: nn.Module) -> bool:
    """Whether calling the module is its class's convolution and nothing else."""
    return type(conv) is nn.Conv2d and not is_hooked(conv)


def is_plain(conv: Any) -> bool:
    """Whether a bare convolution is `torch.convolution` of its parameters as they are now."""
    state = conv.__dict__
    return (
        state["padding_mode"] == "zeros"
        and type(state["padding"]) is tuple
        and type(state["_parameters"].get("weight")) in (nn.Parameter, Tensor)
    )


def is_possible(x: Tensor) -> bool:
    """Whether there is a backward to be had, and autograd that would take the function as it is."""
    return torch.is_grad_enabled() and type(x) is Tensor


def run(x: Tensor, links: Sequence[Link], end: End | None, memory: Memory) -> Tensor | None:
    """The segment's output, or None where this call can't have it as one function."""
    every = links if end is None or end.projection is None else (*links, end.projection)
    shortcut = None if end is None else end.shortcut
    dtype, steps, groups = computing_dtype(x), [], []
    for conv, norm, act in every:
        # A cumulative average has to read the counter first; a frozen norm has no momentum at all.
        if norm.__dict__.get("momentum", 0.0) is None or not dtypes_fit(dtype, norm):
            return None
        steps.append(_step(conv, norm_of(norm), act))
        groups.append(group_of(norm))
    if len(every) > len(links) and not are_joint(links[-1].act, *groups[-2:]):
        return None
    compiling, alone = torch.compiler.is_compiling(), all(group is None for group in groups)
    if compiling and not alone:
        return None  # the operator knows of no process group
    operands = x, shortcut, dtype, steps, len(links)
    requests = None if compiling else requests_of(*operands)
    norms = norms_of(*operands) if compiling else requests and requests.norms
    if norms is None or any(dispatch.serving(request).plain for request in norms):
        return None
    backends = [dispatch.choose(request) for request in norms]
    operators = [_operators(backend, group) for backend, group in zip(backends, groups, strict=False)]
    for link in every:
        count_batch(link.norm)
    if requests is not None:
        steps = convolved(steps, requests.convolutions)
    projection = steps.pop() if len(every) > len(links) else None
    plan = Plan(steps, operators, end is not None, projection, dtype, memory)
    other = None if shortcut is x else shortcut
    if compiling:
        return operator.call(plan, x, other)
    return apply(plan, x, other, SegmentFunction if alone else SyncSegmentFunction)


def convolve(conv: nn.Module, x: Tensor) -> Tensor:
    """conv(x), in a training step by the kernels that the dispatcher names."""
    if not (is_possible(x) and is_bare(conv) and is_plain(conv)):
        return conv(x)
    dtype, step = computing_dtype(x), _step(conv, NO_NORM, IDENTITY)
    request = convolution_of(x, dtype, step)
    if request is None:
        return conv(x)
    if torch.compiler.is_compiling():
        return operator.call_convolution(step, dtype, x)
    (step,) = convolved([step], [request])
    return conv(x) if step.convolution is reference.TRAINING_CONVOLUTION else convolution.apply(step, dtype, x)


def _step(conv: Any, norm: Norm, act: Any) -> Step:
    geometry = Geometry(conv.stride, conv.padding, conv.dilation, conv.groups)
    return Step(conv._parameters["weight"], member(conv, "bias"), geometry, norm, act)


def _operators(backend: Backend, group: Any) -> kernels.Operators:
    return kernels.of(backend, "bn_act") if group is None else Synchronised(backend, group)

"""Which stages of a block can be one differentiable function in this call, and with what.

    z = act(norm(conv(... act(norm(conv(x))))))       a segment
    y = act(norm(conv(z)) + x)                        with an identity shortcut at its end
    y = act(norm(conv(z)) + norm_r(conv_r(x)))        with a projection, both norms in one pass

Where a call can't have that, `fusedres.residual` runs op by op.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusedres import dispatch
from fusedres.backends import Backend, Geometry
from fusedres.memory import Memory
from fusedres.modules import count_batch, dtypes_fit, is_hooked, member, norm_of
from fusedres.ops import kernels
from fusedres.segment import operator
from fusedres.segment.function import SegmentFunction, SyncSegmentFunction, apply
from fusedres.segment.plan import Plan, Step, convolved
from fusedres.segment.requests import computing_dtype, norms_of, requests_of
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
        weight, bias = conv._parameters["weight"], member(conv, "bias")
        geometry = Geometry(conv.stride, conv.padding, conv.dilation, conv.groups)
        steps.append(Step(weight, bias, geometry, norm_of(norm), act))
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


def _operators(backend: Backend, group: Any) -> kernels.Operators:
    return kernels.of(backend, "bn_act") if group is None else Synchronised(backend, group)

"""A segment, or a convolution alone, as one operator: a node of torch.compile's graph, which AOTAutograd takes apart.

So a compiled block computes what the block does without compilation: the same kernels, in the same order.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusedres import build, dispatch, times
from fusedres._version import __version__
from fusedres.backends import Geometry, Norm
from fusedres.epilogue import CATALOGUE, IDENTITY
from fusedres.memory import Memory
from fusedres.native_sources import NATIVE
from fusedres.ops import kernels
from fusedres.segment import convolution
from fusedres.segment.function import apply
from fusedres.segment.plan import ARGUMENTS, NO_NORM, Plan, Step, convolved
from fusedres.segment.requests import convolutions_of

_LIBRARY = torch.library.Library("fusedres", "FRAGMENT")
# Lists hold what every step has, one step after the other, the projection's last.
_LIBRARY.define(
    "segment(Tensor x, Tensor? shortcut, Tensor?[] parameters, Tensor(a!)?[] statistics, int[] integers, "
    "float[] floats, bool joins, bool projects, ScalarType dtype, str memory, str[] backends, str facts) -> Tensor"
)
_LIBRARY.define(
    "convolution(Tensor x, Tensor weight, Tensor? bias, int[] geometry, ScalarType dtype, str facts) -> Tensor"
)
_PACKAGE = Path(__file__).parents[1]
_INTEGERS = 9  # of a step: the geometry's, whether the statistics are the batch's, the activation's code


def call(plan: Plan, x: Tensor, shortcut: Tensor | None) -> Tensor:
    """The function of a plan on x, and on the shortcut where that is another tensor."""
    return torch.ops.fusedres.segment.default(*arguments_of(plan, x, shortcut))


def arguments_of(plan: Plan, x: Tensor, shortcut: Tensor | None) -> tuple[Any, ...]:
    """The operator's arguments, as the schema has them."""
    statistics, integers, floats = [], [], []
    for step in plan.steps:
        stride, padding, dilation, groups = step.geometry
        norm = step.norm
        statistics += [norm.running_mean, norm.running_var]
        integers += [*stride, *padding, *dilation, groups, int(norm.training), step.act.code]
        floats += [norm.momentum, norm.eps]
    joined = plan.joins, plan.projection is not None, plan.dtype, plan.memory.value
    backends = [operators.backend.name for operators in plan.operators]
    return x, shortcut, plan.parameters, statistics, integers, floats, *joined, backends, _facts()


def call_convolution(step: Step, dtype: torch.dtype, x: Tensor) -> Tensor:
    """The step's convolution of x alone, computed in a dtype."""
    stride, padding, dilation, groups = step.geometry
    geometry = [*stride, *padding, *dilation, groups]
    return torch.ops.fusedres.convolution.default(x, step.weight, step.bias, geometry, dtype, _facts())


def _facts() -> str:
    """What else decides how it is computed. AOTAutograd keeps compiled graphs under their text, on disk too:
    one with another library's operators, or made under other settings, must not be found again."""
    found = [
        __version__,
        _digest(_PACKAGE),
        *sorted(f"{name}={value}" for name, value in os.environ.items() if name.startswith("FUSEDRES_")),
    ]
    library = build.resolved(NATIVE)
    if isinstance(library, build.Library):
        found += [library.path.parent.name, times.where("cpu")]
        if times.are_used():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a table that can't be used is no error of whoever compiles
                found.append(times.digest("cpu"))
    return " ".join(found)


@cache
def _digest(package: Path) -> str:
    """Of the code: between two releases it changes under one version."""
    digest = sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


# What torch.compiler.assume_constant_result does, which would import the whole of torch._dynamo.
_facts._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def _segment(
    x: Tensor,
    shortcut: Tensor | None,
    parameters: Sequence[Tensor | None],
    statistics: Sequence[Tensor | None],
    integers: Sequence[int],
    floats: Sequence[float],
    joins: bool,
    projects: bool,
    dtype: torch.dtype,
    memory: str,
    backends: Sequence[str],
    facts: str,
) -> Tensor:
    steps = []
    for at in range(len(parameters) // ARGUMENTS):
        weight, bias, norm_weight, norm_bias = parameters[ARGUMENTS * at : ARGUMENTS * (at + 1)]
        (mean, var), (momentum, eps) = statistics[2 * at : 2 * at + 2], floats[2 * at : 2 * at + 2]
        *geometry, training, code = integers[_INTEGERS * at : _INTEGERS * (at + 1)]
        norm = Norm(norm_weight, norm_bias, mean, var, bool(training), momentum, eps)
        assert weight is not None  # of the list's type alone
        steps.append(Step(weight, bias, _geometry(geometry), norm, CATALOGUE[code]))
    length = len(steps) - projects
    source = x if shortcut is None else shortcut
    steps = convolved(steps, convolutions_of(x, source, dtype, steps, length))
    operators = [kernels.of(dispatch.backend(name), "bn_act") for name in backends]
    projection = steps[-1] if projects else None
    return apply(Plan(steps[:length], operators, joins, projection, dtype, Memory(memory)), x, shortcut)


def _convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Sequence[int], dtype: torch.dtype, facts: str
) -> Tensor:
    steps = [Step(weight, bias, _geometry(geometry), NO_NORM, IDENTITY)]
    (step,) = convolved(steps, convolutions_of(x, None, dtype, steps, 1))
    return convolution.apply(step, dtype, x)


def _geometry(integers: Sequence[int]) -> Geometry:
    *windows, groups = integers
    stride, padding, dilation = ((windows[i], windows[i + 1]) for i in (0, 2, 4))
    return Geometry(stride, padding, dilation, groups)


_LIBRARY.impl("segment", _segment, "CompositeImplicitAutograd")
_LIBRARY.impl("convolution", _convolution, "CompositeImplicitAutograd")

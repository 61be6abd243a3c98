"""The bar: how far each quantity of a case may be from fp64, beside eager.

Errors are relative to what rounding alone would cost: the norm of the summed terms, not of a sum that may cancel.
Gradients are held against the fp64 gradient under the contestant's own mask.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres.backends import Norm
from fusedres.epilogue import find
from fusedres.testing import Case, Operands, candidate, eager, operands

Results = dict[str, Tensor]
Run = Callable[[Case, Operands], Tensor]


def leaves(given: Operands) -> dict[str, Tensor]:
    x, norm, residual, residual_norm, gate, _ = given
    shortcut = residual_norm or Norm()
    named = {
        "dx": x,
        "dweight": norm.weight,
        "dbias": norm.bias,
        "dresidual": residual,
        "dweight_r": shortcut.weight,
        "dbias_r": shortcut.bias,
        "dgate": gate,
    }
    return {name: t for name, t in named.items() if t is not None}


def results(run: Run, case: Case, given: Operands) -> Results:
    """Output, gradients and moved running statistics of one contestant; `given` is left as it is."""
    given = _with_own_statistics(given)
    y = run(case, given)
    named = leaves(given)
    gradients = torch.autograd.grad(y, list(named.values()), given.dy)
    return {"y": y.detach(), **dict(zip(named, gradients, strict=True)), **_moved_statistics(case, given)}


def _moved_statistics(case: Case, given: Operands) -> Results:
    found: Results = {}
    for suffix, norm in (("", given.norm), ("_r", given.residual_norm)):
        if case.op == "affine_act" or norm is None or not norm.training:
            continue
        if norm.running_mean is not None and norm.running_var is not None:
            found[f"running_mean{suffix}"], found[f"running_var{suffix}"] = norm.running_mean, norm.running_var
    return found


def _with_own_statistics(given: Operands) -> Operands:
    def own(norm: Norm | None) -> Norm | None:
        if norm is None or norm.running_mean is None or norm.running_var is None:
            return norm
        return norm._replace(running_mean=norm.running_mean.clone(), running_var=norm.running_var.clone())

    norm = own(given.norm)
    assert norm is not None
    return given._replace(norm=norm, residual_norm=own(given.residual_norm))


def in_double(given: Operands) -> Operands:
    """The same values as fp64 leaves, all contiguous: eager's batch norm backward has been seen to mix up channels
    where x and dy differ in layout and one of the dimensions is 1."""

    def double(t: Tensor) -> Tensor:
        return t.detach().double().contiguous().clone().requires_grad_(t.requires_grad)

    def maybe(t: Tensor | None) -> Tensor | None:
        return None if t is None else double(t)

    def double_norm(norm: Norm) -> Norm:
        weight, bias, mean, var = map(maybe, norm[:4])
        return norm._replace(weight=weight, bias=bias, running_mean=mean, running_var=var)

    x, norm, residual, residual_norm, gate, dy = given
    shortcut_norm = None if residual_norm is None else double_norm(residual_norm)
    return Operands(double(x), double_norm(norm), maybe(residual), shortcut_norm, maybe(gate), double(dy))


class Truth(NamedTuple):
    """fp64 results, and the norm of the terms whose rounding the error is measured in."""

    values: Results
    scales: dict[str, float]
    pre_activation: Tensor


def truth(run: Run, case: Case, given: Operands, y: Tensor) -> Truth:
    """The case in fp64, its gradients under the mask of a contestant's output `y` and with what its max-pool chose."""
    wide = in_double(given)
    act = find(case.act)
    dense = eager(replace(case, act="identity", window=None), wide)
    z = dense if case.window is None else _choose(run, case, given, dense)
    if act.from_output:
        slope = act.derivative(y.double())
        head = torch.where(slope, z, 0.0) if slope.dtype == torch.bool else z * slope
    else:
        head = act.formula(z)
    named = leaves(wide)
    g, *gradients = torch.autograd.grad(head, [dense, *named.values()], wide.dy)
    largest = z if case.window is None else F.max_pool2d(dense, *case.window)
    values = {"y": act.formula(largest).detach(), **dict(zip(named, gradients, strict=True))}
    values.update(_moved_statistics(case, wide))
    return Truth(values, _scales(case, wide, g, values), largest.detach())


def _choose(run: Run, case: Case, given: Operands, dense: Tensor) -> Tensor:
    """What a contestant's max-pool chose of `dense`, by its own activation before the pool."""
    assert case.window is not None
    activation = run(replace(case, op="bn_act", window=None), _with_own_statistics(given))
    _, pixel = F.max_pool2d(activation, *case.window, return_indices=True)
    return dense.flatten(2).gather(2, pixel.flatten(2)).view(pixel.shape)


def _scales(case: Case, wide: Operands, g: Tensor, values: Results) -> dict[str, float]:
    scales = {name: _finite_norm(t) for name, t in values.items()}
    if case.op != "affine_act":  # what is normalised is of order one, also where all values of a channel are equal
        scales["y"] = max(scales["y"], values["y"].numel() ** 0.5)
    for suffix, operand, norm, gx in (
        ("", wide.x, wide.norm, g if wide.gate is None else g * wide.gate),
        ("_r", wide.residual, wide.residual_norm, g),
    ):
        if operand is None or norm is None:
            continue
        mean, rstd = _centre_and_rstd(case, operand.detach(), norm)
        xhat = (operand.detach() - mean) * rstd
        weight = 1.0 if norm.weight is None else norm.weight.detach().view(1, -1, 1, 1)
        terms = {
            "dweight": gx * torch.hypot(xhat, torch.ones_like(xhat)),
            "dbias": gx,
            "dx" if not suffix else "dresidual": gx * weight * rstd,
            "running_mean": (0.1 / rstd).squeeze(),
        }
        for name, t in terms.items():
            key = name if name in ("dx", "dresidual") else name + suffix
            if key in scales:
                scales[key] = max(scales[key] if name != "running_mean" else 0.0, _finite_norm(t))
        if not suffix and "dgate" in scales:
            bias = 0.0 if norm.bias is None else norm.bias.detach().view(1, -1, 1, 1)
            scales["dgate"] = max(
                scales["dgate"], _finite_norm(g * torch.hypot(xhat * weight + bias, torch.ones_like(g)))
            )
    return scales


def _finite_norm(t: Tensor) -> float:
    t = t.detach()
    return float(t[t.isfinite()].norm())


def _centre_and_rstd(case: Case, t: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    if case.op == "affine_act":
        centre = t.new_zeros(t.shape[1]) if norm.running_mean is None else norm.running_mean
        return centre.view(1, -1, 1, 1), t.new_ones(1, t.shape[1], 1, 1)
    if norm.training:
        var, mean = torch.var_mean(t, (0, 2, 3), correction=0, keepdim=True)
        return mean, (var + norm.eps).rsqrt()
    assert norm.running_mean is not None and norm.running_var is not None
    return norm.running_mean.view(1, -1, 1, 1), (norm.running_var + norm.eps).rsqrt().view(1, -1, 1, 1)


@dataclass(frozen=True)
class Comparison:
    """One quantity of one case: errors against fp64, in units of the terms' norm."""

    case: Case
    quantity: str
    eager_error: float
    error: float
    epsilon: float
    eager_mask_errors: int = 0
    mask_errors: int = 0

    def fails_alone(self) -> bool:
        """Whether this single case is over the bar.

        In fp64 the truth is no better than the contestants: a mean of m deviations costs it m ulps. Where all values
        are equal, sqrt(eps) stands for the deviation.
        """
        if self.case.dtype == torch.float64:
            return not self.error <= 1e-12 + _error_of_the_truth(self.case)
        return not self.error <= max(1.1 * self.eager_error, 4 * self.epsilon)


def _error_of_the_truth(case: Case) -> float:
    mean = float(case.values.removeprefix("mean")) if case.values.startswith("mean") else 0.0
    deviations = 1e-5**-0.5 if case.values == "constant" else mean
    return 16 * torch.finfo(torch.float64).eps * deviations


class Yardstick(NamedTuple):
    """A case's tensors and eager's results on them: what every contestant of the case is compared with."""

    given: Operands
    theirs: Results
    their_truth: Truth


def yardstick(case: Case, device: str | torch.device = "cpu") -> Yardstick:
    """Worth keeping where several contestants share a large case."""
    given = operands(case, device)
    theirs = results(eager, case, given)
    return Yardstick(given, theirs, truth(eager, case, given, theirs["y"]))


def compare(
    case: Case, device: str | torch.device = "cpu", run: Run = candidate, beside: Yardstick | None = None
) -> list[Comparison]:
    """Every quantity of a case, the candidate beside eager."""
    given, theirs, their_truth = beside or yardstick(case, device)
    ours = results(run, case, given)
    our_truth = truth(run, case, given, ours["y"])
    rows = []
    for quantity, value in ours.items():
        row = Comparison(
            case,
            quantity,
            error(theirs[quantity], their_truth.values[quantity], their_truth.scales[quantity], theirs[quantity]),
            error(value, our_truth.values[quantity], our_truth.scales[quantity], theirs[quantity]),
            torch.finfo(value.dtype).eps,
        )
        if quantity == "y" and case.act == "relu":
            row = replace(
                row,
                eager_mask_errors=_mask_errors(case, theirs["y"], their_truth),
                mask_errors=_mask_errors(case, value, our_truth),
            )
        rows.append(row)
    return rows


def _mask_errors(case: Case, y: Tensor, exact: Truth) -> int:
    """Elements that ReLU let pass and should not have, or the reverse, but for those whose sign fp64 itself can't
    tell."""
    z = exact.pre_activation
    return int(((~(y <= 0) != ~(z <= 0)) & ~(z.abs() < 1e-10 + _error_of_the_truth(case))).sum())


def error(value: Tensor, exact: Tensor, scale: float, eager_value: Tensor) -> float:
    """|value - exact| / scale over what is finite in fp64; infinite where a NaN or an infinity is neither eager's nor
    fp64's."""
    rounded = exact.to(value.dtype)
    same_as_eager = (value.isnan() == eager_value.isnan()) & (value.isinf() == eager_value.isinf())
    same_as_exact = (value.isnan() == rounded.isnan()) & (value.isinf() == rounded.isinf())
    if not bool((same_as_eager | same_as_exact).all()):
        return math.inf
    both = value.isfinite() & exact.isfinite()
    difference = float((value.double() - exact)[both].norm())
    return 0.0 if difference == 0.0 else difference / scale if scale > 0 else math.inf


@dataclass(frozen=True)
class Pool:
    """All cases of one group and quantity."""

    group: tuple[str, ...]
    quantity: str
    count: int
    geometric_mean: float
    eager_geometric_mean: float
    rms: float
    eager_rms: float
    mask_errors: int
    eager_mask_errors: int

    def fails(self) -> bool:
        """Whether the pooled bar is missed: 1.1 x eager's error, eager's mask errors + 3 sqrt."""
        return (
            self.geometric_mean > 1.1 * self.eager_geometric_mean
            or self.rms > 1.1 * self.eager_rms
            or self.mask_errors > self.eager_mask_errors + 3 * math.sqrt(self.eager_mask_errors + 1)
        )


def pools(comparisons: Iterable[Comparison]) -> Iterator[Pool]:
    """The pooled errors. What rounding alone costs is the least error that counts: half an ulp of an element, and an
    ulp of a sum, whose terms are rounded as well."""
    grouped: dict[tuple[tuple[str, ...], str], list[Comparison]] = defaultdict(list)
    for comparison in comparisons:
        if comparison.case.dtype != torch.float64:  # there the truth is no better than eager
            grouped[comparison.case.group(), comparison.quantity].append(comparison)
    for (group, quantity), rows in sorted(grouped.items()):
        least = 0.5 if quantity in ("y", "dx", "dresidual") else 1.0
        ours = [max(row.error, least * row.epsilon) for row in rows]
        theirs = [max(row.eager_error, least * row.epsilon) for row in rows]
        yield Pool(
            group,
            quantity,
            len(rows),
            _geometric_mean(ours),
            _geometric_mean(theirs),
            _rms(ours),
            _rms(theirs),
            sum(row.mask_errors for row in rows),
            sum(row.eager_mask_errors for row in rows),
        )


def _geometric_mean(errors: list[float]) -> float:
    return (
        math.exp(sum(math.log(e) for e in errors) / len(errors)) if all(math.isfinite(e) for e in errors) else math.inf
    )


def _rms(errors: list[float]) -> float:
    return math.sqrt(sum(e * e for e in errors) / len(errors))

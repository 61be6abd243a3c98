"""The cases and the bar that tests, benchmarks and users' own backends share.

A case describes one call of an op. It is run three times: by eager PyTorch in the case's dtype, by the candidate
through `fusedres.ops`, and in fp64. Errors are relative to what rounding alone would cost: the norm of the summed
terms, not of a sum that may cancel. Gradients are held against the fp64 gradient under the contestant's own mask.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres import ops
from fusedres.backends import Affine, Norm
from fusedres.epilogue import find

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = ("contiguous", "channels_last", "sliced", "permuted")
VALUES = ("normal", "mean1", "mean1e2", "mean1e4", "mean1e7", "constant", "nonfinite", "denormal")
SHAPES = ((4, 1, 5, 5), (2, 3, 7, 5), (3, 35, 6, 4), (6, 8, 1, 1), (2, 64, 9, 9), (5, 16, 3, 11))
LARGE_SHAPES = ((4, 64, 56, 56), (8, 35, 28, 28), (2, 256, 28, 28))
RESIDUALS = ("none", "plain", "other layout", "stride 0", "projection", "frozen projection")
GATES = ("none", "sample", "channel", "both", "scalar")


@dataclass(frozen=True)
class Case:
    """One call of one op.

    Args:
        mode: "training" (batch statistics) or "eval" (running ones).
        parameters: "all", "no weights" (affine=False) or "no running statistics".
    """

    op: str
    dtype: torch.dtype
    layout: str
    shape: tuple[int, ...]
    values: str
    mode: str
    residual: str
    gate: str
    act: str
    parameters: str
    seed: int

    def group(self) -> tuple[str, ...]:
        """What is pooled: all but shape, residual, gate, activation and seed."""
        return self.op, str(self.dtype).removeprefix("torch."), self.layout, self.mode, self.values


def cases(count: int = 2000, *, large: int = 12, seed: int = 0) -> list[Case]:
    """`count` seeded cases, `large` of them of the size of a real layer; every group comes up equally often."""
    generator = random.Random(seed)
    groups = [
        (op, dtype, layout, values, mode)
        for values in VALUES
        for layout in LAYOUTS
        for dtype in DTYPES
        for op in ("bn_act", "affine_act")
        for mode in (("training", "eval") if op == "bn_act" else ("eval",))
    ]
    found = []
    for index in range(count):
        op, dtype, layout, values, mode = groups[index % len(groups)]
        is_large = index % max(count // max(large, 1), 1) == 0 and index // max(count // max(large, 1), 1) < large
        found.append(
            Case(
                op=op,
                dtype=dtype,
                layout=layout,
                shape=generator.choice(LARGE_SHAPES if is_large else SHAPES),
                values=values,
                mode=mode,
                residual=generator.choice(RESIDUALS),
                gate=generator.choice(("none", "none", *GATES)),
                # eager's relu6 passes the gradient at a NaN or not, by where the element falls in its vector loop
                act=generator.choice(("relu", "relu", "identity", "leaky_relu", *_others(values))),
                parameters=generator.choice(("all", "all", "no weights", "no running statistics")),
                seed=index,
            )
        )
    return found


def _others(values: str) -> tuple[str, ...]:
    return ("silu", "gelu") if values == "nonfinite" else ("relu6", "silu", "gelu")


class Operands(NamedTuple):
    """The tensors of one case; those with gradients are leaves."""

    x: Tensor
    norm: Norm
    residual: Tensor | None
    residual_norm: Norm | None
    gate: Tensor | None
    dy: Tensor


def operands(case: Case, device: str | torch.device = "cpu") -> Operands:
    """The case's tensors, from its seed alone."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    n, c, *_ = case.shape
    x = _place(_shift(normal(*case.shape), case.values, generator), case.layout, case.dtype, device)
    residual = None
    if case.residual != "none":
        other = {"contiguous": "channels_last", "channels_last": "contiguous"}.get(case.layout, "contiguous")
        layout = other if case.residual == "other layout" else case.layout
        value = _shift(normal(*case.shape), case.values if "projection" in case.residual else "normal", generator)
        if case.residual == "stride 0":
            residual = value[:1].to(device, case.dtype).expand(case.shape).detach().requires_grad_()
        else:
            residual = _place(value, layout, case.dtype, device)
    gate_shape = {
        "sample": (n, 1, 1, 1),
        "channel": (1, c, 1, 1),
        "both": (n, c, 1, 1),
        "scalar": (1, 1, 1, 1),
    }
    gate = None
    if case.gate != "none":
        gate = (1 + 0.5 * normal(*gate_shape[case.gate])).to(device, case.dtype).requires_grad_()
    norm = _norm(case, normal, x, case.mode == "training")
    residual_norm = None
    if "projection" in case.residual and residual is not None:
        residual_norm = _norm(case, normal, residual, case.mode == "training" and case.residual == "projection")
    dy = normal(*case.shape).to(device, case.dtype)
    return Operands(x, norm, residual, residual_norm, gate, dy)


def _shift(t: Tensor, values: str, generator: torch.Generator) -> Tensor:
    """Unit normal values made into what the value class is about."""
    if values.startswith("mean"):
        return t + float(values.removeprefix("mean"))
    if values == "constant":
        t[:, ::2] = torch.randn(1, t[:, ::2].shape[1], 1, 1, generator=generator, dtype=t.dtype)
    elif values == "nonfinite":
        flat = t.view(-1)
        for value in (math.nan, math.inf, -math.inf):
            flat[int(torch.randint(flat.numel(), (1,), generator=generator))] = value
    elif values == "denormal":
        return t * 1e-39
    return t


def _place(t: Tensor, layout: str, dtype: torch.dtype, device: str | torch.device) -> Tensor:
    """A leaf of these values in that memory order."""
    t = t.to(device, dtype)
    if layout == "channels_last":
        t = t.to(memory_format=torch.channels_last)
    elif layout == "sliced":
        t = torch.stack([t, t + 1], dim=2).flatten(1, 2)[:, ::2]
    elif layout == "permuted":
        t = t.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
    return t.detach().requires_grad_()


def _norm(case: Case, normal: Callable[..., Tensor], t: Tensor, training: bool) -> Norm:
    """Parameters in fp32 as under autocast, fp64 for fp64; running statistics near the tensor's own."""
    c = t.shape[1]
    dtype = torch.promote_types(case.dtype, torch.float32)
    weight = (1 + 0.3 * normal(c)).to(t.device, dtype).requires_grad_()
    bias = (0.3 * normal(c)).to(t.device, dtype).requires_grad_()
    centre = t.detach().double().nan_to_num(0.0, 0.0, 0.0).mean((0, 2, 3)).cpu()
    mean = (centre + 0.1 * normal(c)).to(t.device, dtype)
    var = (1 + 0.3 * normal(c)).abs().to(t.device, dtype)
    if case.parameters == "no weights":
        return Norm(None, None, mean, var, training)
    if case.parameters == "no running statistics" and training:
        return Norm(weight, bias, None, None, training)
    return Norm(weight, bias, mean, var, training)


Results = dict[str, Tensor]
Run = Callable[[Case, Operands], Tensor]


def candidate(case: Case, given: Operands) -> Tensor:
    """The case through `fusedres.ops`, whichever backend is chosen."""
    x, norm, residual, residual_norm, gate, _ = given
    if case.op == "bn_act":
        return ops.bn_act(x, norm, residual=residual, residual_norm=residual_norm, gate=gate, act=case.act)
    affine, residual_affine = _affine(norm), None if residual_norm is None else _affine(residual_norm)
    return ops.affine_act(x, affine, residual=residual, residual_affine=residual_affine, gate=gate, act=case.act)


def eager(case: Case, given: Operands) -> Tensor:
    """The case as an eager network runs it: one function after the other, each rounding to the dtype."""
    x, norm, residual, residual_norm, gate, _ = given
    z = _eager_branch(case, x, norm)
    if gate is not None:
        z = z * gate
    if residual is not None:
        z = z + (residual if residual_norm is None else _eager_branch(case, residual, residual_norm))
    return find(case.act).formula(z)


def _eager_branch(case: Case, t: Tensor, norm: Norm) -> Tensor:
    if case.op == "bn_act":
        mean, var = norm.running_mean, norm.running_var
        return F.batch_norm(t, mean, var, norm.weight, norm.bias, norm.training, norm.momentum, norm.eps)
    scale, bias, mean = (None if p is None else p.view(1, -1, 1, 1) for p in _affine(norm))
    z = t if mean is None else t - mean
    z = z if scale is None else z * scale
    return (z if bias is None else z + bias).to(t.dtype)


def _affine(norm: Norm) -> Affine:
    return Affine(norm.weight, norm.bias, norm.running_mean)


def _leaves(given: Operands) -> dict[str, Tensor]:
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
    leaves = _leaves(given)
    gradients = torch.autograd.grad(y, list(leaves.values()), given.dy)
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True)), **_moved_statistics(case, given)}


def _moved_statistics(case: Case, given: Operands) -> Results:
    found: Results = {}
    for suffix, norm in (("", given.norm), ("_r", given.residual_norm)):
        if case.op != "bn_act" or norm is None or not norm.training:
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


def truth(case: Case, given: Operands, y: Tensor) -> Truth:
    """The case in fp64, its gradients under the mask of a contestant's output `y`."""
    wide = in_double(given)
    act = find(case.act)
    linear = replace(case, act="identity")
    z = eager(linear, wide)
    if act.from_output:
        slope = act.derivative(y)
        head = torch.where(slope, z, 0.0) if slope.dtype == torch.bool else z * slope.double()
    else:
        head = act.formula(z)
    leaves = _leaves(wide)
    g, *gradients = torch.autograd.grad(head, [z, *leaves.values()], wide.dy)
    values = {"y": act.formula(z).detach(), **dict(zip(leaves, gradients, strict=True))}
    values.update(_moved_statistics(case, wide))
    return Truth(values, _scales(case, wide, g, values), z.detach())


def _scales(case: Case, wide: Operands, g: Tensor, values: Results) -> dict[str, float]:
    scales = {name: _finite_norm(t) for name, t in values.items()}
    if case.op == "bn_act":  # what is normalised is of order one, also where all values of a channel are equal
        scales["y"] = max(scales["y"], g.numel() ** 0.5)
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
            values = self.case.values
            mean = float(values.removeprefix("mean")) if values.startswith("mean") else 0.0
            deviations = 1e-5**-0.5 if values == "constant" else mean
            return not self.error <= 1e-12 + 16 * self.epsilon * deviations
        return not self.error <= max(1.1 * self.eager_error, 4 * self.epsilon)


def compare(case: Case, device: str | torch.device = "cpu", run: Run = candidate) -> list[Comparison]:
    """Every quantity of a case, the candidate beside eager."""
    given = operands(case, device)
    ours, theirs = results(run, case, given), results(eager, case, given)
    our_truth, their_truth = truth(case, given, ours["y"]), truth(case, given, theirs["y"])
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
                eager_mask_errors=_mask_errors(theirs["y"], their_truth),
                mask_errors=_mask_errors(value, our_truth),
            )
        rows.append(row)
    return rows


def _mask_errors(y: Tensor, exact: Truth) -> int:
    """Elements that ReLU let pass and should not have, or the reverse; fp64 itself can't tell a sign below 1e-10."""
    z = exact.pre_activation
    return int(((~(y <= 0) != ~(z <= 0)) & ~(z.abs() < 1e-10)).sum())


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
    """The pooled errors; one below half an ulp of the quantity counts as half an ulp, which rounding alone costs."""
    grouped: dict[tuple[tuple[str, ...], str], list[Comparison]] = defaultdict(list)
    for comparison in comparisons:
        if comparison.case.dtype != torch.float64:  # there the truth is no better than eager
            grouped[comparison.case.group(), comparison.quantity].append(comparison)
    for (group, quantity), rows in sorted(grouped.items()):
        ours = [max(row.error, row.epsilon / 2) for row in rows]
        theirs = [max(row.eager_error, row.epsilon / 2) for row in rows]
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


_torchvision_schemas = torch.library.Library("torchvision", "FRAGMENT")


def import_torchvision() -> ModuleType:
    """torchvision, also where its compiled part is a CUDA build beside a CPU torch and does not load.

    Two operator schemas are all that its import then misses.
    """
    if "torchvision" not in sys.modules and not _loads_compiled_torchvision():
        for name in ("nms", "qnms"):
            _torchvision_schemas.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module("torchvision")


def _loads_compiled_torchvision() -> bool:
    found = importlib.util.find_spec("torchvision")
    folders = () if found is None else found.submodule_search_locations or ()
    for library in [path for folder in folders for path in Path(folder).glob("_C*.so")]:
        try:
            torch.ops.load_library(library)
        except OSError:
            return False
    return True

"""bn_act: y = act(k * BN_x(x) + BN_r(r)), either batch norm optional, statistics from the batch or running."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedres import dispatch
from fusedres.backends import Norm, Statistics, reference
from fusedres.epilogue import CATALOGUE, IDENTITY, Activation
from fusedres.ops import contract, gradients, kernels


def bn_act(
    x: Tensor,
    norm: Norm | None = None,
    *,
    residual: Tensor | None = None,
    residual_norm: Norm | None = None,
    gate: Tensor | None = None,
    act: str | Activation = "relu",
) -> Tensor:
    """Batch norm, add a residual (itself normalised where it is a projection), activate.

        y = act(gate * BN(x) + BN_r(residual))

    Differentiable, to any order, in every tensor but the running statistics, which move in place.

    Args:
        x: (N, C, ...); y has its shape and dtype.
        norm: x's batch norm; None takes x as it is.
        residual: x's shape; stride 0 is fine, broadcasting is not done.
        residual_norm: the residual's batch norm, of a projection shortcut.
        gate: (1 or N, 1 or C, 1, ...), multiplies the branch: drop-path, SE, an Euler step.
        act: a name of the catalogue, `fusedres.epilogue.CATALOGUE`.

    >>> x = torch.tensor([[1.0], [3.0]])
    >>> bn_act(x, Norm(training=True), residual=x).round()
    tensor([[0.],
            [4.]])
    """
    activation = contract.activation(act)
    contract.check_tensors(x, residual, gate)
    contract.check_norm(x, "norm", norm, x)
    contract.check_norm(x, "residual_norm", residual_norm, residual)
    sources = statistics_of(norm), statistics_of(residual_norm)
    request = contract.request(
        "bn_act", x, residual, gate, activation, contract.parameter_dtype(norm, residual_norm), *sources
    )
    backend = dispatch.choose(request)
    if "bn_act" in backend.plain:
        return backend.plain["bn_act"](x, norm, residual, residual_norm, gate, activation)
    y = kernels.of(backend, "bn_act")(*arguments_of(x, norm, residual, residual_norm, gate, activation))
    if not torch.compiler.is_compiling():  # a compiled graph writes the statistics back itself
        torch.autograd.graph.increment_version(moved_by(norm, residual_norm))
    return y


_ABSENT = Norm()


def statistics_of(norm: Norm | None) -> int:
    """Where a norm's statistics come from, as the schemas have it."""
    if norm is None:
        return Statistics.ABSENT.value
    return (Statistics.BATCH if norm.training else Statistics.RUNNING).value


def arguments_of(
    x: Tensor,
    norm: Norm | None,
    residual: Tensor | None,
    residual_norm: Norm | None,
    gate: Tensor | None,
    act: Activation,
) -> tuple[Any, ...]:
    """The operators' arguments, as the schema has them."""
    weight, bias, mean, var, _, momentum, eps = norm or _ABSENT
    weight_r, bias_r, mean_r, var_r, _, momentum_r, eps_r = residual_norm or _ABSENT
    tensors = (x, weight, bias, mean, var, residual, weight_r, bias_r, mean_r, var_r, gate)
    sources = statistics_of(norm), statistics_of(residual_norm)
    return *tensors, *sources, momentum, momentum_r, eps, eps_r, act.code


def moved_by(*norms: Norm | None) -> list[Tensor]:
    """The running statistics that a call moves."""
    moving = [norm for norm in norms if norm is not None and norm.training]
    return [t for norm in moving for t in (norm.running_mean, norm.running_var) if t is not None]


class BnAct(torch.autograd.Function):
    """The op's gradients out of a backend's two kernels."""

    @staticmethod
    def forward(ctx: Any, operators: kernels.Kernels, *arguments: Any) -> Tensor:
        x, weight, bias, _, _, residual, weight_r, bias_r, _, _, gate, *scalars = arguments
        source, source_r, _, _, eps, eps_r, code = scalars
        activation = CATALOGUE[code]
        y, stats, stats_r, mask = operators.forward(*arguments, kernels.keeps_mask(activation, residual))

        needs = ctx.needs_input_grad
        _, _, need_weight, _, _, _, _, need_weight_r, _, _, _, need_gate, *_ = needs
        smooth = not activation.from_output
        ctx.operators, ctx.activation = operators, activation
        ctx.sources, ctx.eps = (source, source_r), (eps, eps_r)
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.save_for_backward(
            None if smooth or activation is IDENTITY or mask.numel() else y,
            mask if mask.numel() else None,
            x if smooth or source == Statistics.BATCH or need_weight or need_gate else None,
            weight,
            bias,
            stats,
            residual if smooth or source_r == Statistics.BATCH or need_weight_r else None,
            weight_r,
            bias_r,
            stats_r,
            gate,
        )
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, _, _, residual, weight_r, bias_r, _, _, gate, *_ = ctx.needs_input_grad[1:]
        needs = [x, weight, bias, residual, weight_r, bias_r, gate]
        run = _backward_again if torch.is_grad_enabled() else _backward_once
        dx, dweight, dbias, dr, dweight_r, dbias_r, dgate = run(ctx, dy, needs)
        none = [None] * 7
        return None, dx, dweight, dbias, None, None, dr, dweight_r, dbias_r, None, None, dgate, *none


def _backward_once(ctx: Any, dy: Tensor, needs: list[bool]) -> list[Tensor | None]:
    saved = ctx.saved_tensors
    _, _, _, weight, bias, _, _, weight_r, bias_r, _, gate = saved
    # Without an activation and a norm of its own the residual's gradient is dy itself.
    passes = ctx.activation is IDENTITY and ctx.sources[1] == Statistics.ABSENT
    wanted = [needed and not (index == 3 and passes) for index, needed in enumerate(needs)]
    found = list(ctx.operators.backward(dy, *saved, *ctx.sources, ctx.activation.code, wanted))
    if passes:
        found[3] = dy
    operands = (None, weight, bias, None, weight_r, bias_r, gate)
    dtypes = [None if t is None else t.dtype for t in operands]
    dtypes[3] = ctx.residual_dtype
    return [gradients.cast(d, dtype) if needed else None for d, dtype, needed in zip(found, dtypes, needs, strict=True)]


def _backward_again(ctx: Any, dy: Tensor, needs: list[bool]) -> list[Tensor | None]:
    """create_graph: the formula rerun; where the output tells the slope, on the pre-activation alone."""
    y, mask, x, weight, bias, stats, residual, weight_r, bias_r, stats_r, gate = ctx.saved_tensors
    activation, (source, source_r), (eps, eps_r) = ctx.activation, ctx.sources, ctx.eps
    slope = gradients.activation_slope(activation, y, mask, dy)
    if x is None:
        x = gradients.placeholder(dy, dy.dtype)
    if residual is None and ctx.residual_dtype is not None:
        residual = gradients.placeholder(dy, ctx.residual_dtype)

    def formula(x, weight, bias, residual, weight_r, bias_r, gate):
        if residual is not None:
            residual = gradients.normalise_again(residual, weight_r, bias_r, stats_r, source_r, eps_r)
        branch = gradients.normalise_again(x, weight, bias, stats, source, eps)
        z = reference.join(branch, residual, gate, owned=False)
        return gradients.apply_slope(z, slope) if activation.from_output else activation.formula(z)

    return gradients.differentiable(formula, (x, weight, bias, residual, weight_r, bias_r, gate), needs, dy)


def _fake_forward(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    source, source_r = arguments[10:12]
    y = kernels.empty_output(x)
    stats, stats_r = (
        x.new_empty((3, x.shape[1]) if s else (0,), dtype=kernels.accumulation_dtype(x)) for s in (source, source_r)
    )
    return y, stats, stats_r, kernels.empty_mask(y, arguments[-1])


def _fake_backward(
    dy,
    y,
    mask,
    x,
    weight,
    bias,
    stats,
    residual,
    weight_r,
    bias_r,
    stats_r,
    gate,
    *rest,
) -> tuple[Tensor, ...]:
    memory_format = kernels.gradient_format(dy, y, mask, x, residual)
    return kernels.fake_gradients(dy, memory_format, (x, weight, bias, residual, weight_r, bias_r, gate), rest[-1])


def _fake_backward_in_place(*arguments: Any) -> tuple[Tensor, ...]:
    dy, _, _, x, _, _, _, residual, *_ = arguments
    dx, dweight, dbias, dr, *rest = _fake_backward(*arguments)
    dx, dr = (d if t is None else kernels.nothing(dy) for t, d in ((x, dx), (residual, dr)))
    return dx, dweight, dbias, dr, *rest


_BACKWARD = (
    "Tensor dy, Tensor? y, Tensor? mask, Tensor? x, Tensor? weight, Tensor? bias, Tensor stats, "
    "Tensor? residual, Tensor? weight_r, Tensor? bias_r, Tensor stats_r, Tensor? gate, "
    "int statistics, int statistics_r, int act"
)
_OVERWRITING = _BACKWARD.replace("Tensor? x", "Tensor(a!)? x").replace("Tensor? residual", "Tensor(b!)? residual")
SPEC = kernels.Spec(
    name="bn_act",
    arguments=(
        "Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
        "Tensor? residual, Tensor? weight_r, Tensor? bias_r, Tensor(c!)? running_mean_r, Tensor(d!)? running_var_r, "
        "Tensor? gate, int statistics, int statistics_r, float momentum, float momentum_r, float eps, float eps_r, "
        "int act"
    ),
    backward_arguments=_BACKWARD,
    # stats: (3, C): the mean's high part, its remainder, 1 / sqrt(var + eps); (0,) for an absent norm
    results="Tensor y, Tensor stats, Tensor stats_r, Tensor mask",
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    function=BnAct,
    in_place=kernels.InPlace(_OVERWRITING, _fake_backward_in_place),
)

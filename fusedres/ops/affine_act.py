"""affine_act: y = act(k * A_x(x) + A_r(r)), A(t) = (t - mean[c]) * scale[c] + bias[c], either of them optional."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedres import dispatch
from fusedres.backends import Affine, reference
from fusedres.epilogue import CATALOGUE, IDENTITY, Activation
from fusedres.ops import contract, gradients, kernels

_ABSENT = Affine()


def affine_act(
    x: Tensor,
    affine: Affine | None = None,
    *,
    residual: Tensor | None = None,
    residual_affine: Affine | None = None,
    gate: Tensor | None = None,
    act: str | Activation = "relu",
) -> Tensor:
    """Scale and shift per channel, add a residual, activate: one pass, one rounding.

        y = act(gate * ((x - mean) * scale + bias) + ((residual - mean_r) * scale_r + bias_r))

    Every tensor is differentiable, to any order.

    Args:
        x: (N, C, ...); y has its shape and dtype.
        affine: x's (C,) scale, bias and mean; an absent one is left out.
        residual: x's shape; stride 0 is fine, broadcasting is not done.
        residual_affine: the same for the residual.
        gate: (1 or N, 1 or C, 1, ...), multiplies the branch: LayerScale, drop-path, SE, an Euler step.
        act: a name of the catalogue, `fusedres.epilogue.CATALOGUE`.

    >>> x = torch.tensor([[-1.0, 2.0]])
    >>> affine_act(x, Affine(scale=torch.tensor([2.0, 3.0]), bias=torch.tensor([0.5, 0.5])), residual=x)
    tensor([[0.0000, 8.5000]])
    """
    activation = contract.activation(act)
    contract.check_tensors(x, residual, gate)
    contract.check_branch(x, "affine", affine, x)
    contract.check_branch(x, "residual_affine", residual_affine, residual)
    request = contract.request(
        "affine_act",
        x,
        residual,
        gate,
        activation,
        contract.parameter_dtype(affine, residual_affine),
    )
    backend = dispatch.choose(request)
    if "affine_act" in backend.plain:
        return backend.plain["affine_act"](x, affine, residual, residual_affine, gate, activation)
    operands = (x, *(affine or _ABSENT), residual, *(residual_affine or _ABSENT), gate)
    return kernels.of(backend, "affine_act")(*operands, activation.code)


class AffineAct(torch.autograd.Function):
    """The op's gradients out of a backend's two kernels."""

    @staticmethod
    def forward(ctx: Any, operators: kernels.Kernels, *arguments: Any) -> Tensor:
        x, scale, bias, mean, residual, scale_r, bias_r, mean_r, gate, code = arguments
        activation = CATALOGUE[code]
        y, mask = operators.forward(*arguments, kernels.keeps_mask(activation, residual))

        _, _, need_scale, _, _, _, need_scale_r, _, _, need_gate, _ = ctx.needs_input_grad
        smooth = not activation.from_output
        ctx.operators, ctx.activation = operators, activation
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.save_for_backward(
            None if smooth or activation is IDENTITY or mask.numel() else y,
            mask if mask.numel() else None,
            x if smooth or need_scale or need_gate else None,
            scale,
            bias,
            mean,
            residual if smooth or need_scale_r else None,
            scale_r,
            bias_r,
            mean_r,
            gate,
        )
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        run = _backward_again if torch.is_grad_enabled() else _backward_once
        return None, *run(ctx, dy), None


def _backward_once(ctx: Any, dy: Tensor) -> list[Tensor | None]:
    y, mask, x, scale, bias, mean, residual, scale_r, bias_r, mean_r, gate = ctx.saved_tensors
    needs = ctx.needs_input_grad[1:-1]
    need_x, need_scale, need_bias, need_mean, need_r, need_scale_r, need_bias_r, need_mean_r, need_gate = needs
    passes = ctx.activation is IDENTITY and scale_r is None  # the residual's gradient is dy itself
    wanted = [
        need_x,
        need_scale,
        need_bias or need_mean,
        need_r and not passes,
        need_scale_r,
        need_bias_r or need_mean_r,
        need_gate,
    ]
    branch, shortcut = (scale, bias, mean), (scale_r, bias_r, mean_r)
    dx, dscale, dbias, dr, dscale_r, dbias_r, dgate = ctx.operators.backward(
        dy, y, mask, x, *branch, residual, *shortcut, gate, ctx.activation.code, wanted
    )
    dr = dy if passes else dr
    found = [
        dx,
        dscale,
        dbias,
        _mean_gradient(dbias, scale),
        dr,
        dscale_r,
        dbias_r,
        _mean_gradient(dbias_r, scale_r),
        dgate,
    ]
    dtypes = [None, *map(_dtype, branch), ctx.residual_dtype, *map(_dtype, shortcut), _dtype(gate)]
    return [gradients.cast(d, dtype) if needed else None for d, dtype, needed in zip(found, dtypes, needs, strict=True)]


def _backward_again(ctx: Any, dy: Tensor) -> list[Tensor | None]:
    """create_graph: the formula rerun; where the output tells the slope, on the pre-activation alone."""
    y, mask, x, *affine, residual, scale_r, bias_r, mean_r, gate = ctx.saved_tensors
    activation = ctx.activation
    slope = gradients.activation_slope(activation, y, mask, dy)
    if x is None:
        x = gradients.placeholder(dy, dy.dtype)
    if residual is None and ctx.residual_dtype is not None:
        residual = gradients.placeholder(dy, ctx.residual_dtype)

    def formula(x, scale, bias, mean, residual, scale_r, bias_r, mean_r, gate):
        if residual is not None:
            residual = reference.apply_affine(residual, Affine(scale_r, bias_r, mean_r))
        z = reference.join(reference.apply_affine(x, Affine(scale, bias, mean)), residual, gate, owned=False)
        return gradients.apply_slope(z, slope) if activation.from_output else activation.formula(z)

    operands = (x, *affine, residual, scale_r, bias_r, mean_r, gate)
    return gradients.differentiable(formula, operands, ctx.needs_input_grad[1:-1], dy)


def _mean_gradient(dbias: Tensor, scale: Tensor | None) -> Tensor:
    return -dbias if scale is None or not dbias.numel() else -dbias * scale


def _dtype(t: Tensor | None) -> torch.dtype | None:
    return None if t is None else t.dtype


def _fake_forward(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    y = kernels.empty_output(x)
    return y, kernels.empty_mask(y, arguments[-1])


def _fake_backward(
    dy,
    y,
    mask,
    x,
    scale,
    bias,
    mean,
    residual,
    scale_r,
    bias_r,
    mean_r,
    gate,
    act,
    needs,
) -> tuple[Tensor, ...]:
    memory_format = kernels.gradient_format(dy, y, mask, x, residual)
    return kernels.fake_gradients(dy, memory_format, (x, scale, bias, residual, scale_r, bias_r, gate), needs)


_BRANCHES = (
    "Tensor? scale, Tensor? bias, Tensor? mean, Tensor? residual, "
    "Tensor? scale_r, Tensor? bias_r, Tensor? mean_r, Tensor? gate, int act"
)
SPEC = kernels.Spec(
    name="affine_act",
    arguments=f"Tensor x, {_BRANCHES}",
    backward_arguments=f"Tensor dy, Tensor? y, Tensor? mask, Tensor? x, {_BRANCHES}",
    results="Tensor y, Tensor mask",
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    function=AffineAct,
)

"""What the ops' autograd functions share: the activation's slope, and gradients that can be differentiated again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fusedres.backends import Affine, Statistics, reference
from fusedres.epilogue import Activation


def unpack_mask(mask: Tensor, like: Tensor) -> Tensor:
    """The bits of `kernels.empty_mask` as a bool tensor of `like`'s shape."""
    bits = (mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=mask.device)).bitwise_and(1).bool()
    rows = bits.flatten(-2)
    n, c, *pixels = like.shape
    if mask.dim() == 2:
        return rows[:, :c].reshape(n, *pixels, c).movedim(-1, 1)
    return rows[..., : like.numel() // (n * c)].reshape(like.shape)


def apply_slope(z: Tensor, slope: Tensor | None) -> Tensor:
    """slope * z; a bool slope selects, so that a masked NaN becomes 0 as in eager."""
    if slope is None:
        return z
    return torch.where(slope, z, 0.0) if slope.dtype == torch.bool else slope * z


def activation_slope(activation: Activation, y: Tensor | None, mask: Tensor | None, like: Tensor) -> Tensor | None:
    """d act / dz of an activation whose output tells it; None stands for 1."""
    if mask is not None:
        return unpack_mask(mask, like)
    return None if y is None else activation.derivative(y.to(torch.promote_types(y.dtype, torch.float32)))


def placeholder(dy: Tensor, dtype: torch.dtype) -> Tensor:
    """Stands for an operand in which the formula is linear, so that its value was not saved."""
    return dy.new_zeros((), dtype=dtype).expand(dy.shape).requires_grad_()


def differentiable(
    formula: Callable[..., Tensor], operands: Sequence[Tensor | None], needs: Sequence[bool], dy: Tensor
) -> list[Tensor | None]:
    """Gradients of `formula(*operands)` that can be differentiated again, by rerunning it."""
    with torch.enable_grad():
        # Aliases: one operand may have been computed from another, whose gradient must not run through it.
        aliases = [t.view_as(t) if needed and t is not None else t for t, needed in zip(operands, needs, strict=True)]
        wanted = [t for t, needed in zip(aliases, needs, strict=True) if needed and t is not None]
        found = iter(torch.autograd.grad(formula(*aliases), wanted, dy, create_graph=True))
    return [next(found) if needed else None for needed in needs]


def normalise_again(
    t: Tensor, weight: Tensor | None, bias: Tensor | None, stats: Tensor, source: int, eps: float
) -> Tensor:
    """A batch norm spelled out: aten's takes its statistics for constants from the third order on."""
    if source == Statistics.ABSENT:
        return t
    if source == Statistics.BATCH:
        wide = t.to(stats.dtype)
        var, mean = torch.var_mean(wide, [d for d in range(t.dim()) if d != 1], correction=0)
        rstd = (var + eps).rsqrt()
    else:
        high, low, rstd = stats
        mean = high + low
    return reference.apply_affine(t, Affine(rstd if weight is None else rstd * weight, bias, mean))


def affine_of(stats: Tensor, weight: Tensor | None, bias: Tensor | None) -> Affine:
    """The norm as an affine, to the same bits as the kernels' own."""
    mean, mean_low, rstd = stats
    scale = rstd if weight is None else (rstd.double() * weight).to(rstd.dtype)
    # -0 for an absent bias: t + -0 is t for every t.
    bias = torch.full_like(rstd, -0.0) if bias is None else bias
    return Affine(scale, (bias.double() - mean_low.double() * scale).to(rstd.dtype), mean)


def cast(gradient: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The gradient in its operand's dtype; kernels accumulate in a wider one."""
    return gradient if dtype is None or gradient.dtype == dtype else gradient.to(dtype)

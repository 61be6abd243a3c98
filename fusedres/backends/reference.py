"""The meaning of every op in plain aten; every other backend is tested against it.

    y = act(k * BN_x(x) + BN_r(r)),    y = act(conv(x) + r)

It registers nothing: autograd, double backward and torch.compile see ordinary operations, those that eager runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres.backends import (
    Affine,
    Backend,
    Convolution,
    Filter,
    Geometry,
    Norm,
    Request,
    TrainingConvolution,
    Window,
)
from fusedres.epilogue import RELU, Activation


def _per_channel(t: Tensor, like: Tensor) -> Tensor:
    return t.view(1, -1, *[1] * (like.dim() - 2))


def apply_affine(t: Tensor, affine: Affine | None) -> Tensor:
    """(t - mean) * scale + bias in at least fp32, rounded once to t's dtype."""
    if affine is None:
        return t
    z = t.to(torch.promote_types(t.dtype, torch.float32))
    # The mean first: t * scale + shift cancels when |mean| is much larger than the deviation.
    if affine.mean is not None:
        z = z - _per_channel(affine.mean, t)
    if affine.scale is not None:
        z = z * _per_channel(affine.scale, t)
    if affine.bias is not None:
        z = z + _per_channel(affine.bias, t)
    return z.to(t.dtype)


def apply_norm(t: Tensor, norm: Norm | None) -> Tensor:
    """Eager's batch norm; the running statistics move in training."""
    return t if norm is None else F.batch_norm(t, *_in_eager_order(norm))


def _in_eager_order(
    norm: Norm,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, bool, float, float]:
    weight, bias, running_mean, running_var, training, momentum, eps = norm
    return running_mean, running_var, weight, bias, training, momentum, eps


def join(branch: Tensor, residual: Tensor | None, gate: Tensor | None, *, owned: bool) -> Tensor:
    """gate * branch + residual in the branch's dtype; a branch that is ours is overwritten, as eager blocks do."""
    dtype = branch.dtype
    if gate is not None:
        branch, owned = (branch * gate).to(dtype), True
    if residual is None:
        return branch
    return branch.add_(residual) if owned else (branch + residual).to(dtype)


def _activate(z: Tensor, act: Activation, x: Tensor) -> Tensor:
    return F.relu(z, inplace=z is not x) if act is RELU else act.formula(z)


def affine_act(
    x: Tensor,
    affine: Affine | None,
    residual: Tensor | None,
    residual_affine: Affine | None,
    gate: Tensor | None,
    act: Activation,
) -> Tensor:
    if residual is not None:
        residual = apply_affine(residual, residual_affine)
    return _activate(join(apply_affine(x, affine), residual, gate, owned=False), act, x)


def bn_act(
    x: Tensor,
    norm: Norm | None,
    residual: Tensor | None,
    residual_norm: Norm | None,
    gate: Tensor | None,
    act: Activation,
) -> Tensor:
    if residual is not None:
        residual = apply_norm(residual, residual_norm)
    return _activate(join(apply_norm(x, norm), residual, gate, owned=norm is not None), act, x)


def bn_act_pool(x: Tensor, norm: Norm, window: Window, act: Activation) -> Tensor:
    return F.max_pool2d(_activate(apply_norm(x, norm), act, x), *window)


def conv_act(
    x: Tensor, taps: Filter, residual: Tensor | None, geometry: Geometry, act: Activation, in_place: bool
) -> Tensor:
    z = F.conv2d(x, taps.weight, taps.bias, *geometry)
    return _activate(join(z, residual, None, owned=True), act, x)


def as_it_is(taps: Filter, geometry: Geometry, sizes: Sequence[int], joins: bool) -> Filter:
    """The packing of a backend that takes a filter as it is: its bias in the weight's dtype, unless a scale comes
    before it."""
    weight, bias, scale = taps
    return taps if bias is None or scale is not None else Filter(weight, bias.to(weight.dtype))


def conv_forward(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    stride, padding, dilation, groups = geometry
    return torch.convolution(x, weight, bias, stride, padding, dilation, False, (0, 0), groups)


def conv_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    geometry: Geometry,
    wanted: Sequence[bool],
    residual: Tensor | None,
    in_place: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """A 1x1 convolution's dx is a matrix product, which can be accumulated into the residual."""
    stride, padding, dilation, groups = geometry
    wants_dx, *wants_rest = wanted
    # What a matrix product is accumulated into.
    into = (
        residual
        if in_place and residual is not None and is_matmul(weight, geometry) and is_rows(residual, dy)
        else None
    )
    dx = dweight = dbias = None
    if any(wants_rest) or into is None:
        dx, dweight, dbias = torch.ops.aten.convolution_backward.default(
            dy, x, weight, weight.shape[:1], stride, padding, dilation, False, (0, 0), groups,
            [wants_dx and into is None, *wants_rest],
        )  # fmt: skip
    if dx is not None and residual is not None:
        dx.add_(residual)
    if wants_dx and into is not None:
        if stride == (1, 1):
            _rows(into).addmm_(_rows(dy), weight.flatten(1))
        else:
            sizes = dy.shape[0], weight.shape[1], *dy.shape[2:]
            seen = torch.empty(sizes, dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last)  # not read
            product, _, _ = conv_backward(dy, seen, weight, Geometry(), (True, False, False), None, False)
            assert product is not None  # it was wanted
            spread_(into, product, stride)
        dx = into
    return dx, dweight, dbias


def is_matmul(weight: Tensor, geometry: Geometry) -> bool:
    """Whether a convolution is a matrix product of the pixels that it sees."""
    return geometry == Geometry(geometry.stride) and weight.shape[2:] == (1, 1)


def spread_(into: Tensor, gradient: Tensor, stride: Sequence[int]) -> None:
    """Adds what a 1x1 convolution gives the pixels that it sees."""
    into[:, :, :: stride[0], :: stride[1]].add_(gradient)


def is_rows(*tensors: Tensor) -> bool:
    """Whether they lie in memory pixel by pixel, each with all its channels."""
    for t in tensors:  # noqa: SIM110  in all() it takes three times as long, and every convolution asks
        if not t.is_contiguous(memory_format=torch.channels_last):
            return False
    return True


def _rows(t: Tensor) -> Tensor:
    """(N*H*W, C) of channels_last."""
    return t.permute(0, 2, 3, 1).view(-1, t.shape[1])


def _objection(request: Request) -> str | None:
    return None


TRAINING_CONVOLUTION = TrainingConvolution(conv_forward, conv_backward)
BACKEND = Backend(
    "reference",
    _objection,
    plain={"affine_act": affine_act, "bn_act": bn_act, "bn_act_pool": bn_act_pool},
    convolution=Convolution(as_it_is, conv_act),
    training_convolution=TRAINING_CONVOLUTION,
)

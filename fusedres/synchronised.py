"""Batch norms whose statistics are those of a whole process group, by the ops' kernels.

    forward   bn_act's statistics of this share; gather every process's mean, variance and count, merge them by Chan;
              then one pass of affine_act
    backward  one pass of bn_act's backward with the statistics held fixed: g, dweight, dbias; sum the latter over the
              group; then dx = A * g + B * (x - mean) + D,  A = weight * rstd, B = -A * rstd * dweight / M,
              D = -A * dbias / M, in one pass of affine_act

One small collective each way, for both norms of a projection block together. torch's own norm refuses CPU tensors; this
one takes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fusedres import dispatch
from fusedres.backends import Affine, Backend, Norm, Statistics
from fusedres.epilogue import IDENTITY, Activation
from fusedres.modules import count_batch, norm_of
from fusedres.ops import contract, gradients, kernels
from fusedres.ops.bn_act import BnAct, arguments_of

_ABSENT, _BATCH, _RUNNING = Statistics.ABSENT.value, Statistics.BATCH.value, Statistics.RUNNING.value


def group_of(norm: nn.Module | None) -> Any:
    """The process group that a norm would synchronise with in this call, or None."""
    if type(norm) is not nn.SyncBatchNorm or not norm.training:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def are_joint(act: Activation, group: Any, group_r: Any) -> bool:
    """Whether a norm and the shortcut's can be one call, by their groups: one sum over one group each way."""
    return group == group_r and (group is None or act.from_output)


def bn_act(
    x: Tensor,
    norm: Any,
    residual: Tensor | None,
    residual_norm: Any,
    gate: Tensor | None,
    act: Activation,
    group: Any,
) -> Tensor | None:
    """`ops.bn_act` on modules, both norms over the group and joint; None where no kernels serve it."""
    if torch.compiler.is_compiling():
        return None
    members = [Norm(m.weight, m.bias, m.running_mean, m.running_var) for m in (norm, residual_norm) if m is not None]
    request = contract.request("bn_act", x, residual, gate, act, contract.parameter_dtype(*members), _BATCH)
    # A share without images goes the others' way.
    request = request._replace(empty=False, residual_statistics=_ABSENT if residual_norm is None else _BATCH)
    backend = dispatch.choose(request)
    if backend.plain:
        return None
    count_batch(norm)
    count_batch(residual_norm)
    norms = norm_of(norm), None if residual_norm is None else norm_of(residual_norm)
    arguments = arguments_of(x, norms[0], residual, norms[1], gate, act)
    return _SyncBnAct.apply(Synchronised(backend, group), *arguments)  # pyright: ignore[reportReturnType]


class _SyncBnAct(BnAct):
    """With statistics of a process group, of which only the first derivatives are known."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return BnAct.backward(ctx, dy)


class Synchronised:
    """A backend's operators of bn_act where the batch is the whole group's: in the place of `kernels.Kernels`.

    Norms of running statistics are not for it; those of both operands go by the same group. The shares may be of any
    sizes, and some of them empty.
    """

    backward_in_place = None

    def __init__(self, backend: Backend, group: Any) -> None:
        self.backend, self.group = backend, group
        self._affine_act, self._bn_act = kernels.of(backend, "affine_act"), kernels.of(backend, "bn_act")

    def forward(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        residual: Tensor | None,
        weight_r: Tensor | None,
        bias_r: Tensor | None,
        running_mean_r: Tensor | None,
        running_var_r: Tensor | None,
        gate: Tensor | None,
        statistics: int,
        statistics_r: int,
        momentum: float,
        momentum_r: float,
        eps: float,
        eps_r: float,
        act: int,
        keep_mask: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(y, stats, stats_r, mask)"""
        operands = [x] if residual is None or statistics_r == _ABSENT else [x, residual]
        moments = _merge([self._moments(t) for t in operands], self.group)
        stats, stats_r = _settle(x, moments[0], running_mean, running_var, momentum, eps), kernels.nothing(x)
        shortcut = Affine()
        if len(moments) > 1:
            stats_r = _settle(x, moments[1], running_mean_r, running_var_r, momentum_r, eps_r)
            shortcut = gradients.affine_of(stats_r, weight_r, bias_r)
        if not x.numel():
            return kernels.empty_output(x), stats, stats_r, kernels.nothing(x)
        affine = gradients.affine_of(stats, weight, bias)
        y, mask = self._affine_act.forward(x, *affine, residual, *shortcut, gate, act, keep_mask)
        return y, stats, stats_r, mask

    def backward(
        self,
        dy: Tensor,
        y: Tensor | None,
        mask: Tensor | None,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        stats: Tensor,
        residual: Tensor | None,
        weight_r: Tensor | None,
        bias_r: Tensor | None,
        stats_r: Tensor,
        gate: Tensor | None,
        statistics: int,
        statistics_r: int,
        act: int,
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        """The seven gradients; dweight and dbias are of this share, as those of every parameter are."""
        branch, shortcut = _Operand(x, weight, bias, stats), None
        if statistics_r != _ABSENT and residual is not None:
            # Its activation tells the slope by y or the mask, without the pre-activation.
            shortcut, residual = _Operand(residual, weight_r, bias_r, stats_r), None
        need_x, _, _, need_r, _, _, need_gate = needs
        dgate = None if gate is None else torch.zeros_like(gate)
        if x.numel():
            wanted = [False, True, True, need_x or need_r or shortcut is not None, False, False, need_gate]
            _, dweight, dbias, g, _, _, dgate = self._reduce(dy, y, mask, branch, residual, gate, act, wanted)
            sums = [dweight, dbias]
            if shortcut is not None:
                _, *more, _, _, _, _ = self._reduce(g, None, None, shortcut, None, None, IDENTITY.code, _SUMS)
                sums += more
        else:
            g, sums = dy, [torch.zeros_like(stats[0])] * (2 if shortcut is None else 4)
        dx, dr = None, g
        if need_x or (need_r and shortcut is not None):
            means = _mean(sums, x, self.group)
            dx = self._spread(g, gate, branch, *means[:2])
            dr = g if shortcut is None else self._spread(g, None, shortcut, *means[2:])
        return dx, *sums[:2], dr, *(sums[2:] or (None, None)), dgate

    def _moments(self, t: Tensor) -> _Moments:
        """Of this share: the statistics that `bn_act` computes; its output is not wanted."""
        count = t.new_full((1,), t.numel() // t.shape[1], dtype=torch.float64)
        if not t.numel():
            nothing = count.new_zeros(t.shape[1])
            return _Moments(nothing, nothing, count)
        norm = Norm(training=True, eps=_NO_EPS)
        high, low, rstd = self._bn_act.forward(*arguments_of(t, norm, None, None, None, IDENTITY), False)[1].double()
        return _Moments(high + low, rstd.pow(-2) - _NO_EPS, count)

    def _reduce(
        self,
        dy: Tensor,
        y: Tensor | None,
        mask: Tensor | None,
        operand: _Operand,
        residual: Tensor | None,
        gate: Tensor | None,
        act: int,
        wanted: list[bool],
    ) -> tuple[Tensor, ...]:
        """`bn_act`'s backward with the statistics held fixed: the residual's gradient is g."""
        absent = None, None, kernels.nothing(dy)
        return self._bn_act.backward(dy, y, mask, *operand, residual, *absent, gate, _RUNNING, _ABSENT, act, wanted)

    def _spread(self, g: Tensor, gate: Tensor | None, operand: _Operand, dweight: Tensor, dbias: Tensor) -> Tensor:
        """A * gate * g + B * (x - mean) + D, by the sums' means over the batch."""
        x, weight, _, (mean, low, rstd) = operand
        if not x.numel():
            return torch.empty_like(x)
        a = rstd.double() if weight is None else rstd.double() * weight
        b, d = -a * rstd * dweight, -a * dbias
        scale, scale_r, bias_r = (t.to(rstd.dtype) for t in (a, b, d - b * low))
        branches = g, scale, None, None, x, scale_r, bias_r, mean
        return self._affine_act.forward(*branches, gate, IDENTITY.code, False)[0]


class _Operand(NamedTuple):
    """What is normalised, by what."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    stats: Tensor  # (3, C)


_SUMS = [False, True, True, False, False, False, False]  # dweight and dbias alone


_NO_EPS = 1e-30  # the least of a variance that is not zero; fp32 has its root


class _Moments(NamedTuple):
    """Of each channel, in fp64, and the number of values they are of."""

    mean: Tensor  # (C,)
    var: Tensor  # (C,), biased
    count: Tensor  # (1,)


def _merge(operands: list[_Moments], group: Any) -> list[_Moments]:
    """Every operand's moments over the group, by Chan's merge of all shares at once."""
    mine = [t for moments in operands for t in moments]
    sizes, packed = [t.numel() for t in mine], torch.cat(mine)
    shares = [torch.empty_like(packed) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shares, packed, group)
    columns = torch.stack(shares).split(sizes, dim=1)  # (shares, C) or (shares, 1) each
    found = []
    for means, variances, counts in zip(columns[::3], columns[1::3], columns[2::3], strict=True):
        count = counts.sum(0)
        mean = (means * counts).sum(0) / count
        found.append(_Moments(mean, ((variances + (means - mean).square()) * counts).sum(0) / count, count))
    return found


def _mean(sums: list[Tensor], x: Tensor, group: Any) -> list[Tensor]:
    """This share's sums and all others', divided by the number of the whole batch's values, in fp64."""
    values = x.new_full((1,), x.numel() // x.shape[1], dtype=torch.float64)
    packed = torch.cat([*(t.double() for t in sums), values])
    dist.all_reduce(packed, group=group)
    return list((packed[:-1] / packed[-1:]).chunk(len(sums)))


def _settle(
    x: Tensor,
    moments: _Moments,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> Tensor:
    """(3, C) as kernels have it; the running statistics move."""
    mean, var, count = moments
    dtype = kernels.accumulation_dtype(x)
    unbiased = var * (count / (count - 1))
    for running, now in ((running_mean, mean), (running_var, unbiased)):
        if running is not None:
            running.copy_(running.double() * (1 - momentum) + now * momentum)
    high = mean.to(dtype)
    return torch.stack([high, (mean - high).to(dtype), (var + eps).rsqrt().to(dtype)])

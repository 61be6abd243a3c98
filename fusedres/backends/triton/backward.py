"""Every op's gradients: sums over the tensor where any are wanted, then the elementwise pass."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fusedres.backends.triton.configurations import GRADIENT_APPLY, GRADIENT_SUMS
from fusedres.backends.triton.gradients import gate_finish, gradient_apply, gradient_finish, gradient_sums
from fusedres.backends.triton.launch import Operand, Plan, finish, gate_strides, per_image
from fusedres.backends.triton.view import View, accumulation_dtype


class Saved(NamedTuple):
    """What a forward left for its backward, and dy."""

    dy: Tensor
    y: Tensor | None
    mask: Tensor | None
    x: Operand
    r: Operand
    gate: Tensor | None
    act: int
    from_batch: tuple[bool, bool]  # x's and r's statistics


class Sums(NamedTuple):
    """Per part and channel: sum g, sum g * (x - mean), sum g * (r - mean_r)."""

    partial: Tensor  # (3, groups * pieces, C)
    groups: int  # images where the gate has a value per image
    pieces: int


def backward(saved: Saved, needs: list[bool]) -> tuple[Tensor, ...]:
    """dx, dweight, dbias, dr, dweight_r, dbias_r, dgate; those that are not needed are empty."""
    need_x, need_weight, need_bias, need_r, need_weight_r, need_bias_r, need_gate = needs
    x, r, gate = saved.x, saved.r, saved.gate
    view = View.of_backward(saved.dy, saved.y, saved.mask, x.data, r.data)
    saved = saved._replace(dy=view.dense(saved.dy))
    dtype = accumulation_dtype(saved.dy)

    def per_channel(needed: bool) -> Tensor:
        return saved.dy.new_empty(view.channels, dtype=dtype) if needed else nothing()

    def per_element(needed: bool, operand: Operand) -> Tensor:
        return view.empty_output(saved.dy if operand.data is None else operand.data) if needed else nothing()

    def nothing() -> Tensor:
        return saved.dy.new_empty(0)

    dx, dr = per_element(need_x, x), per_element(need_r, r)
    dweight, dbias = per_channel(need_weight), per_channel(need_bias)
    dweight_r, dbias_r = per_channel(need_weight_r), per_channel(need_bias_r)
    dgate = nothing()

    x_from_batch, r_from_batch = need_x and saved.from_batch[0], need_r and saved.from_batch[1]
    slopes = saved.dy.new_empty((2, view.channels), dtype=dtype) if x_from_batch else None
    slopes_r = saved.dy.new_empty((2, view.channels), dtype=dtype) if r_from_batch else None
    view = view if per_image(gate) else view.merged()
    of_x, of_r = need_weight or need_gate or x_from_batch, need_weight_r or r_from_batch
    if of_x or of_r or need_bias or need_bias_r:
        sums = sum_gradients(saved, view, of_x, of_r)
        if need_weight or need_bias or x_from_batch:
            finish_operand(sums, 1 if of_x else None, x, gate, view, dweight, dbias, slopes)
        if need_weight_r or need_bias_r or r_from_batch:
            finish_operand(sums, 2 if of_r else None, r, None, view, dweight_r, dbias_r, slopes_r)
        if need_gate:
            dgate = finish_gate(sums, x, gate, view)
    if need_x or need_r:
        apply_gradients(saved, view, dx if need_x else None, slopes, dr if need_r else None, slopes_r)
    return dx, dweight, dbias, dr, dweight_r, dbias_r, dgate


def sum_gradients(saved: Saved, view: View, of_x: bool, of_r: bool) -> Sums:
    plan = Plan.of(GRADIENT_SUMS, view, saved.dy)
    groups = view.images if per_image(saved.gate) else 1
    pieces = plan.parts(plan.tiles // groups, groups)
    partial = saved.dy.new_empty((3, groups * pieces, view.channels), dtype=accumulation_dtype(saved.dy))
    plan.run(
        gradient_sums,
        groups * pieces,
        *saved[:3],
        *saved.x[:-1],
        *saved.r[:-1],
        saved.gate,
        gate_strides(saved.gate),
        partial,
        view.pixels,
        view.channels,
        plan.tiles,
        groups,
        pieces,
        NORM_X=saved.x.norm,
        NORM_R=saved.r.norm,
        PRODUCT_X=of_x,
        PRODUCT_R=of_r,
        ACT=saved.act,
    )
    return Sums(partial, groups, pieces)


def finish_operand(
    sums: Sums,
    product: int | None,
    operand: Operand,
    gate: Tensor | None,
    view: View,
    dweight: Tensor,
    dbias: Tensor,
    slopes: Tensor | None,
) -> None:
    finish(
        gradient_finish,
        1,
        view.channels,
        sums.partial[0],
        None if product is None else sums.partial[product],
        operand.centre,
        operand.weight,
        gate,
        gate_strides(gate),
        dweight if dweight.numel() else None,
        dbias if dbias.numel() else None,
        slopes,
        float(view.images * view.pixels),
        view.channels,
        sums.groups * sums.pieces,
        sums.pieces,
        NORM=operand.norm,
    )


def finish_gate(sums: Sums, x: Operand, gate: Tensor | None, view: View) -> Tensor:
    assert gate is not None
    dgate = sums.partial.new_empty((sums.groups, view.channels))
    branch = sums.partial[0], sums.partial[1], x.centre, x.weight, x.bias
    finish(gate_finish, sums.groups, view.channels, *branch, dgate, view.channels, sums.pieces, NORM=x.norm)
    return (dgate if gate.shape[1] > 1 else dgate.sum(1)).view(gate.shape)


def apply_gradients(
    saved: Saved, view: View, dx: Tensor | None, slopes: Tensor | None, dr: Tensor | None, slopes_r: Tensor | None
) -> None:
    plan = Plan.of(GRADIENT_APPLY, view, saved.dy)
    plan.run_elementwise(
        gradient_apply,
        *saved[:3],
        *saved.x[:-1],
        slopes,
        *saved.r[:-1],
        slopes_r,
        saved.gate,
        gate_strides(saved.gate),
        dx,
        dr,
        view.pixels,
        view.channels,
        plan.tiles,
        NORM_X=saved.x.norm,
        NORM_R=saved.r.norm,
        ACT=saved.act,
    )

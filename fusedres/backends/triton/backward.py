"""Every op's gradients: sums over the tensor where any are wanted, then the elementwise pass."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fusedres.backends.triton.arguments import Gate, Operand, Slope
from fusedres.backends.triton.configurations import (
    GRADIENT_APPLY,
    GRADIENT_SUMS,
    POOL_GRADIENT_APPLY,
    POOL_GRADIENT_SUMS,
)
from fusedres.backends.triton.gradients import gate_finish, gradient_apply, gradient_finish, gradient_sums
from fusedres.backends.triton.launch import Plan, finish
from fusedres.backends.triton.pool import Pool
from fusedres.backends.triton.view import View, accumulation_dtype
from fusedres.epilogue import RELU


class Saved(NamedTuple):
    """What a forward left for its backward, and dy: the kernels' operands first."""

    slope: Slope
    pool: Pool | None
    x: Operand
    r: Operand
    gate: Gate
    act: int
    from_batch: tuple[bool, bool]  # x's and r's statistics

    def view(self) -> View:
        if self.pool is not None and self.x.data is not None:
            return View.of_planes(self.x.data)
        return View.of_backward(*self.slope, self.x.data, self.r.data)


class Sums(NamedTuple):
    """Per part and channel: sum g, sum g * (x - mean), sum g * (r - mean_r)."""

    partial: Tensor  # (3, groups * pieces, C)
    groups: int  # images where the gate has a value per image
    pieces: int


def backward(saved: Saved, needs: list[bool]) -> tuple[Tensor, ...]:
    """dx, dweight, dbias, dr, dweight_r, dbias_r, dgate; those that are not needed are empty."""
    need_x, need_weight, need_bias, need_r, need_weight_r, need_bias_r, need_gate = needs
    view = saved.view()
    dy = view.dense(saved.slope.dy)
    saved = saved._replace(slope=saved.slope._replace(dy=dy))
    x, r, gate = saved.x, saved.r, saved.gate
    dtype = accumulation_dtype(dy.dtype)

    def per_channel(needed: bool) -> Tensor:
        return dy.new_empty(view.channels, dtype=dtype) if needed else nothing()

    def per_element(needed: bool, operand: Operand) -> Tensor:
        return view.empty_output(dy if operand.data is None else operand.data) if needed else nothing()

    def nothing() -> Tensor:
        return dy.new_empty(0)

    dx, dr = per_element(need_x, x), per_element(need_r, r)
    dweight, dbias = per_channel(need_weight), per_channel(need_bias)
    dweight_r, dbias_r = per_channel(need_weight_r), per_channel(need_bias_r)
    dgate = nothing()

    x_from_batch, r_from_batch = need_x and saved.from_batch[0], need_r and saved.from_batch[1]
    slopes = dy.new_empty((2, view.channels), dtype=dtype) if x_from_batch else None
    slopes_r = dy.new_empty((2, view.channels), dtype=dtype) if r_from_batch else None
    view = view if gate.per_image() or saved.pool is not None else view.merged()
    of_x, of_r = need_weight or need_gate or x_from_batch, need_weight_r or r_from_batch
    if of_x and (x_from_batch or not need_x) and _is_relu_of_x(saved):
        # Every pass reads x anyway: z's sign costs less than reading y.
        saved = saved._replace(slope=saved.slope._replace(y=None))
    if of_x or of_r or need_bias or need_bias_r:
        sums = sum_gradients(saved, view, of_x, of_r)
        if need_weight or need_bias or x_from_batch:
            finish_operand(sums, 1 if of_x else None, x, gate, view, dweight, dbias, slopes)
        if need_weight_r or need_bias_r or r_from_batch:
            finish_operand(sums, 2 if of_r else None, r, Gate.of(None), view, dweight_r, dbias_r, slopes_r)
        if need_gate:
            dgate = finish_gate(sums, x, gate, view)
    if need_x or need_r:
        apply_gradients(saved, view, slopes, slopes_r, dx if need_x else None, dr if need_r else None)
    return dx, dweight, dbias, dr, dweight_r, dbias_r, dgate


def _is_relu_of_x(saved: Saved) -> bool:
    """Whether the slope is that of a ReLU of what x alone makes."""
    return saved.act == RELU.code and saved.slope.mask is None and saved.r.data is None and saved.pool is None


def sum_gradients(saved: Saved, view: View, of_x: bool, of_r: bool) -> Sums:
    dy = saved.slope.dy
    plan = Plan.of(GRADIENT_SUMS if saved.pool is None else POOL_GRADIENT_SUMS, view, dy)
    groups = view.images if saved.gate.per_image() else 1
    pieces = plan.parts(plan.tiles // groups, groups)
    partial = dy.new_empty((3, groups * pieces, view.channels), dtype=accumulation_dtype(dy.dtype))
    sizes = view.pixels, view.channels, plan.tiles, groups, pieces
    wanted = {"PRODUCT_X": of_x, "PRODUCT_R": of_r, "ACT": saved.act}
    plan.run(gradient_sums, groups * pieces, *saved[:5], partial, *sizes, **wanted)
    return Sums(partial, groups, pieces)


def finish_operand(
    sums: Sums,
    product: int | None,
    operand: Operand,
    gate: Gate,
    view: View,
    dweight: Tensor,
    dbias: Tensor,
    slopes: Tensor | None,
) -> None:
    products = None if product is None else sums.partial[product]
    results = dweight if dweight.numel() else None, dbias if dbias.numel() else None, slopes
    sizes = float(view.images * view.pixels), view.channels, sums.groups * sums.pieces, sums.pieces
    finish(gradient_finish, 1, view.channels, sums.partial[0], products, operand, gate, *results, *sizes)


def finish_gate(sums: Sums, x: Operand, gate: Gate, view: View) -> Tensor:
    assert gate.data is not None
    dgate = sums.partial.new_empty((sums.groups, view.channels))
    branch = sums.partial[0], sums.partial[1], x
    finish(gate_finish, sums.groups, view.channels, *branch, dgate, view.channels, sums.pieces)
    return (dgate if gate.data.shape[1] > 1 else dgate.sum(1)).view(gate.data.shape)


def apply_gradients(
    saved: Saved, view: View, slopes: Tensor | None, slopes_r: Tensor | None, dx: Tensor | None, dr: Tensor | None
) -> None:
    plan = Plan.of(GRADIENT_APPLY if saved.pool is None else POOL_GRADIENT_APPLY, view, saved.slope.dy)
    results, sizes = (slopes, slopes_r, dx, dr), (view.pixels, view.channels, plan.tiles)
    plan.run_elementwise(gradient_apply, *saved[:5], *results, *sizes, ACT=saved.act)

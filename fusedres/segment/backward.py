"""The backward of a segment: from the end of the chain to its start.

The first convolution's gradient is added into the shortcut's. Gradients that nobody asked for are not computed. Double
backward reruns the formula, as the ops do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedres.backends import Statistics, reference
from fusedres.epilogue import IDENTITY
from fusedres.ops import gradients, kernels
from fusedres.ops.bn_act import statistics_of
from fusedres.segment.plan import ARGUMENTS, FIRST, Kept, Plan, Step, in_layout_of, is_dropped


class Backward:
    """The walk from the end of the chain to its start.

    Args:
        x, source: what the chain and the projection convolve, in the dtype that was computed in.
        shared: whether both come from one argument, whose gradient is then a sum.
        y, mask: what tells the slope of the last activation.
        needs: which gradients are wanted: of x, the shortcut, and each step's arguments.
        owned: whether nobody else will ever read the convolutions' results, so that gradients may be written over them.
    """

    def __init__(
        self,
        plan: Plan,
        x: Tensor,
        source: Tensor,
        shared: bool,
        y: Tensor | None,
        mask: Tensor | None,
        links: list[Kept],
        needs: Sequence[bool],
        owned: bool,
    ) -> None:
        self.plan, self.x, self.source, self.shared, self.owned = plan, x, source, shared, owned
        self.y, self.mask, self.links, self.needs = y, mask, links, needs
        self.wants_source = needs[0 if shared else 1]
        self.into_source: Tensor | None = None  # the shortcut's gradient
        self.waiting: Tensor | None = None  # of the projection's result, where its convolution's turn is the last
        self.found: list[Tensor | None] = [None] * len(needs)

    def run(self, dy: Tensor) -> list[Tensor | None]:
        """The gradients, in the arguments' order."""
        plan, end = self.plan, len(self.plan.chain) - 1
        activated, gradient = self.y, dy
        for index in range(end, -1, -1):
            step, entering = plan.chain[index], self._entering(index)
            if plan.joins and index == end:
                d_output = self._end(index, step, gradient, entering)
            else:
                d_output = self._norm(index, step, gradient, activated)
            activated = self.y = self.mask = None
            self.links[index] = self.links[index]._replace(output=None)
            if d_output is None:
                break
            if index == 0:
                self.found[0] = self._first(step, d_output, dy)
                break
            gradient = self._convolution(index, step, d_output, entering, self._wants_before(index))
            if gradient is None:
                break
            activated, self.links[index] = entering, self.links[index].without_values()
            del d_output, entering
        return self.found

    def _wants(self, index: int) -> Sequence[bool]:
        """Which of a step's arguments: weight, bias, norm weight, norm bias."""
        at = FIRST + ARGUMENTS * index
        return self.needs[at : at + ARGUMENTS]

    def _wants_before(self, index: int) -> bool:
        return self.needs[0] or any(self.needs[FIRST : FIRST + ARGUMENTS * index])

    def _wants_output(self, index: int) -> bool:
        weight, bias, *_ = self._wants(index)
        return weight or bias or self._wants_before(index)

    def _store(self, index: int, first: int, *found: Tensor | None) -> None:
        """In the arguments' dtypes at once: those of a block in two dtypes would be more than eager ever holds."""
        for offset, gradient in enumerate(found, first):
            at, argument = FIRST + ARGUMENTS * index + offset, self.links[index][offset]
            if self.needs[at] and gradient is not None and argument is not None:
                self.found[at] = gradients.cast(gradient, argument.dtype)

    def _entering(self, index: int) -> Tensor:
        """What the step convolved; an activation that was not kept is computed again, to the same bits."""
        kept = self.x if index == 0 else self.links[index].entering
        if kept is not None:
            return kept
        before = index - 1
        return _activate_again(self.plan.operators[before], self.plan.chain[before], self.links[before])

    def _norm(self, index: int, step: Step, dy: Tensor, y: Tensor | None) -> Tensor | None:
        """From the gradient of a step's result to that of its convolution's."""
        wants_output = self._wants_output(index)
        wanted = [wants_output, *self._wants(index)[2:], False, False, False, False]
        if not any(wanted):
            return None
        y = y if step.act.from_output and step.act is not IDENTITY else None
        dx, dweight, dbias, *_ = self._normalise(index, dy, y, wanted, self.links[index])
        self._store(index, 2, dweight, dbias)
        return dx if wants_output else None

    def _end(self, index: int, step: Step, dy: Tensor, entering: Tensor) -> Tensor | None:
        """The same where the shortcut was added, whose gradients are found on the way."""
        projection, link_r = self.plan.projection, None
        wants_output, wants_residual = self._wants_output(index), self.wants_source
        # Without an activation and a norm of its own the shortcut's gradient is dy itself.
        dr = dy if step.act is IDENTITY and projection is None else None
        wanted = [wants_output, *self._wants(index)[2:], wants_residual and dr is None, False, False, False]
        link = self._with_output(index, step, entering)
        residual = None if step.act.from_output else self.source
        if projection is not None:
            link_r = self._with_output(index + 1, projection, self.source)
            residual = link_r.output
            weight_r, bias_r, *norm_r = self._wants(index + 1)
            wanted[3:6] = wants_residual or weight_r or bias_r, *norm_r
        if residual is not None and link.output is not None:
            residual = in_layout_of(link.output, residual)
        dx = None
        if any(wanted):
            dx, dweight, dbias, found, dweight_r, dbias_r, _ = self._normalise(
                index, dy, self.y, wanted, link, residual, link_r
            )
            self._store(index, 2, dweight, dbias)
            dr = found if wanted[3] else dr
            if projection is not None and link_r is not None:
                self._store(index + 1, 2, dweight_r, dbias_r)
                self.links[index + 1] = link_r._replace(output=None)
                if wanted[3]:
                    dr = self._projection(index + 1, projection, found)
        self.into_source = dr if self.wants_source else None
        if not self.shared:
            self.found[1] = self.into_source
        return dx if wants_output else None

    def _normalise(
        self,
        index: int,
        dy: Tensor,
        y: Tensor | None,
        wanted: list[bool],
        link: Kept,
        residual: Tensor | None = None,
        link_r: Kept | None = None,
    ) -> tuple[Tensor, ...]:
        """The seven gradients of `ops.bn_act`; those of convolutions' results over these, where they are owned."""
        step, projection, operators = self.plan.chain[index], self.plan.projection, self.plan.operators[index]
        shortcut, source_r = (None, None, kernels.nothing(dy)), Statistics.ABSENT.value
        if link_r is not None and projection is not None:
            shortcut, source_r = (link_r.norm_weight, link_r.norm_bias, link_r.stats), statistics_of(projection.norm)
        branch = link.output, link.norm_weight, link.norm_bias, link.stats
        sources = statistics_of(step.norm), source_r
        arguments = dy, y, self.mask, *branch, residual, *shortcut, None, *sources, step.act.code, wanted
        run = operators.backward_in_place
        if run is None or not self.owned or (residual is not None and link_r is None):
            return operators.backward(*arguments)
        dx, dweight, dbias, dr, *rest = run(*arguments)
        if wanted[0] and link.output is not None:
            dx = link.output
        if wanted[3] and residual is not None:
            dr = residual
        return dx, dweight, dbias, dr, *rest

    def _projection(self, index: int, step: Step, dy: Tensor) -> Tensor | None:
        """The gradient of what the projection convolved; None where that waits, because dy takes less memory."""
        if self.wants_source and self.shared and dy.numel() < self.source.numel():
            self.waiting = dy
            return None
        dx = self._convolution(index, step, dy, self.source, self.wants_source)
        self.links[index] = self.links[index].without_values()
        return dx

    def _with_output(self, index: int, step: Step, entering: Tensor) -> Kept:
        link = self.links[index]
        if link.output is not None or not is_dropped(self.plan, link.weight):
            return link
        return link._replace(output=step.convolve(entering, link.computed_weight(), link.bias))

    def _convolution(
        self,
        index: int,
        step: Step,
        dy: Tensor,
        entering: Tensor,
        wanted: bool,
        residual: Tensor | None = None,
        in_place: bool = False,
    ) -> Tensor | None:
        """From the gradient of a convolution's result to that of what it convolved, with a residual."""
        weight, bias, *_ = self._wants(index)
        if not (weight or bias or wanted):
            return None
        filters = self.links[index].computed_weight()
        dx, dweight, dbias = step.convolution.backward(
            dy, entering, filters, step.geometry, (wanted, weight, bias), residual, in_place, *step.chosen
        )
        self._store(index, 0, dweight, dbias)
        return dx if wanted else None

    def _first(self, step: Step, d_output: Tensor, dy: Tensor) -> Tensor | None:
        """From the gradient of the first convolution's result to x's, with the shortcut's share."""
        into_source, projection = self.into_source, self.plan.projection
        if self.waiting is not None and projection is not None:
            dx = self._convolution(0, step, d_output, self.x, True)
            return self._convolution(len(self.plan.chain), projection, self.waiting, self.source, True, dx, True)
        if into_source is None or not self.shared:
            return self._convolution(0, step, d_output, self.x, self.needs[0])
        return self._convolution(0, step, d_output, self.x, True, into_source, into_source is not dy)


def _activate_again(operators: kernels.Operators, step: Step, link: Kept) -> Tensor:
    """act(norm(output)) from the saved statistics, with the forward's roundings."""
    affine = gradients.affine_of(link.stats, link.norm_weight, link.norm_bias)
    affine_act = kernels.of(operators.backend, "affine_act")
    return affine_act.forward(link.output, *affine, *[None] * 5, step.act.code, False)[0]


def backward_again(
    plan: Plan, links: list[Kept], arguments: list[Tensor | None], needs: Sequence[bool], dy: Tensor
) -> list[Tensor | None]:
    """create_graph: the formula rerun in ordinary operations."""

    def run(step: Step, link: Kept, x: Tensor, weight: Tensor, bias: Any, norm_weight: Any, norm_bias: Any) -> Tensor:
        # aten's convolution, which can be differentiated again
        step = step._replace(convolution=reference.TRAINING_CONVOLUTION, chosen=())
        z = step.convolve(x.to(plan.dtype), weight.to(plan.dtype), bias)
        return gradients.normalise_again(z, norm_weight, norm_bias, link.stats, statistics_of(step.norm), step.norm.eps)

    def formula(x: Tensor, shortcut: Tensor | None, *parameters: Any) -> Tensor:
        groups = [parameters[at : at + ARGUMENTS] for at in range(0, len(parameters), ARGUMENTS)]
        residual, y = x if shortcut is None else shortcut, x
        if plan.projection is not None:
            residual = run(plan.projection, links[-1], residual, *groups[-1])
        for index, step in enumerate(plan.chain):
            y = run(step, links[index], y, *groups[index])
            if plan.joins and index == len(plan.chain) - 1:
                y = reference.join(y, residual, None, owned=False)
            y = step.act.formula(y)
        return y

    with torch.autocast(dy.device.type, enabled=False):
        return gradients.differentiable(formula, arguments, needs, dy)

"""tune(model, *inputs): time what a training step can choose from on this machine, and keep the times."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fusedres import times
from fusedres.backends import native_training
from fusedres.backends.native_training import Problem
from fusedres.times import Times
from fusedres.tuning import convolutions

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Row:
    """What was found for one result of a convolution.

    Args:
        convolution: x's sizes, the weight's, and how its windows lie.
        result: "y", "dx", "dx+add" where the shortcut's gradient is added to it, or "dweight".
        chosen: "aten", "direct", or "winograd" with its tile.
        times: milliseconds of each that could be chosen; none where they did not settle, which leaves it to the rule.
    """

    convolution: str
    result: str
    chosen: str
    times: Times


@dataclass(frozen=True)
class Tuning:
    """What was measured, and the file that keeps it; printing it gives a table."""

    path: Path
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        if not self.rows:
            return "nothing to choose from: no fused block of this model trains on kernels of fusedres's own here"
        cells = [("convolution", "result", "chosen", "times")]
        cells += [(r.convolution, r.result, r.chosen, _words(r)) for r in self.rows]
        widths = [max(len(line[column]) for line in cells) for column in range(3)]
        lines = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[3]])
            for line in cells
        ]
        return "\n".join([*lines, f"kept in {self.path}"])


def _words(row: Row) -> str:
    return times.words(row.chosen, row.times) if row.times else "did not settle: by the rule"


def tune(model: nn.Module, *inputs: Any, progress: Progress | None = None) -> Tuning:
    """Time who computes the convolutions of a training step fastest, and choose by that from now on.

    A step of a copy of the model, forward and backward, tells which convolutions there are. Then each of their results
    is computed by aten and by every form that fusedres has for it, on random values of the same sizes; that takes
    seconds for each. The times are kept for this number of threads in a table of the user's cache, which later
    processes read. Whoever the rule names is chosen unless another is a tenth faster. FUSEDRES_TUNE=0, deterministic
    algorithms and a forced backend leave it to the rule.

    The model, its statistics and gradients, the inputs and the random state stay as they are.

    Args:
        model: fused or made of fusedres's blocks, on a CPU, as it will be trained.
        inputs: what the model takes. Call it under autocast where the model is trained under autocast.
        progress: called with the number of results that are measured, and of all.
    """
    if not times.are_used():
        raise RuntimeError(
            "tune would measure what nothing uses: FUSEDRES_TUNE=0, deterministic algorithms and a forced backend "
            "leave the choice to the rule; lift that first"
        )
    places = {t.device.type for t in model.parameters()} - {"cpu"}
    if places:
        raise ValueError(
            f"tune times the convolutions of a model on a CPU, and this one is on {places.pop()}; "
            "the Triton kernels of a GPU are timed by python -m fusedres tune"
        )
    found = convolutions.problems_of(lambda: _step(model, inputs))
    with times.measuring():
        for done, (problem, strides) in enumerate(found.items(), 1):
            convolutions.measure(problem, strides)
            if progress is not None:
                progress(done, len(found))
    return Tuning(times.table_of("cpu").path, tuple(map(_row, found)))


def _step(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Forward and backward of a copy."""
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        twin, given = copy.deepcopy(model), pytree.tree_map_only(Tensor, _copied, inputs)
        outputs = [y for y in pytree.tree_leaves(twin(*given)) if isinstance(y, Tensor) and y.requires_grad]
        with torch.autocast("cpu", enabled=False):
            torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])


def _copied(t: Tensor) -> Tensor:
    return t.detach().clone().requires_grad_(t.requires_grad)


def _row(problem: Problem) -> Row:
    tile, found = native_training.choose(problem)
    sizes, weight_sizes = ("x".join(map(str, numbers)) for numbers in (problem.sizes, problem.weight_sizes))
    stride, _, dilation, _ = problem.geometry
    apart = "".join(
        f", {name} {'x'.join(map(str, by))}"
        for name, by in (("stride", stride), ("dilation", dilation))
        if by != (1, 1)
    )
    return Row(f"{sizes} by {weight_sizes}{apart}", problem.result, native_training.name_of(tile), found)

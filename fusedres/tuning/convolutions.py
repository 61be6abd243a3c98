"""A training step's convolutions on a CPU: which of them have a choice, and how long each candidate takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from fusedres import dispatch, times
from fusedres.backends import native_training
from fusedres.backends.native_training import Problem, Tiles
from fusedres.times import Calls

Strides = tuple[int, ...]


def problems_of(step: Callable[[], None]) -> Mapping[Problem, Strides]:
    """What a step has a choice for, each with its weight's strides; a convolution's results together."""
    dispatch.clear()
    native_training.collected = found = {}
    try:
        step()
    finally:
        native_training.collected = None
        dispatch.clear()
    first = {problem[1:]: number for number, problem in reversed([*enumerate(found)])}
    order = sorted(found, key=lambda problem: (first[problem[1:]], native_training.RESULTS.index(problem.result)))
    return {problem: found[problem] for problem in order}


def measure(problem: Problem, strides: Strides) -> None:
    """Take a problem's times, which choose from now on; inside `times.measuring`."""
    calls, warm = _calls(problem, strides)
    times.take("cpu", problem.entry, calls, warm)
    dispatch.clear()


def _calls(problem: Problem, strides: Strides) -> tuple[Calls, list[Tensor]]:
    """What a step calls, by candidate, and what its last operation has just written."""
    result, sizes, weight_sizes, geometry, dtype = problem
    outputs, _, *kernel = weight_sizes
    rows, columns = geometry.output_size((kernel[0], kernel[1]), *sizes[2:])
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=generator).to(dtype)
        return drawn.contiguous(memory_format=torch.channels_last)

    x, weight = normal(*sizes), torch.empty_strided(weight_sizes, strides, dtype=dtype)
    weight.copy_(normal(*weight_sizes) / weight[0].numel() ** 0.5)
    ways = {name: Tiles(tile, tile, tile) for name, tile in native_training.candidates(problem).items()}
    if result == "y":
        forward = partial(native_training.forward, x, weight, None, geometry)
        return {name: partial(forward, tiles, tiles) for name, tiles in ways.items()}, [x]
    dy = normal(sizes[0], outputs, rows, columns)
    residual = normal(*sizes) if result == "dx+add" else None
    wanted = result != "dweight", result == "dweight", False
    backward = partial(native_training.backward, dy, x, weight, geometry, wanted, residual, residual is not None)
    warm = [dy] if residual is None else [dy, residual]
    return {name: partial(backward, tiles, tiles) for name, tiles in ways.items()}, warm

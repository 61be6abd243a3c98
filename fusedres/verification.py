"""verify(model, x): a fused model against itself unfused, on the user's own data, beside fp64."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fusedres import dispatch
from fusedres.fusion import unfuse
from fusedres.swap import Fused

Results = dict[str, dict[str, Tensor]]

# What a ReLU whose input rounds to the other side of 0 may change a gradient by, in eager as in fusedres.
_FLIPPED_RELU = 0.02
_SLACK = 2.0
_EPSILONS = 4
# A tensor this much smaller than the largest of its quantity is a cancellation (the gradient of a bias before a norm):
# its error is measured against this size.
_VANISHING = 1e-3
_TINY = 1e-300


@dataclass(frozen=True)
class Comparison:
    """One quantity in one mode: the RMS over its tensors of |error| / |fp64|, norms of whole tensors.

    Args:
        mode: "training" or "eval".
        quantity: "outputs", "gradients" or "running statistics".
        eager: the unfused model's error against fp64.
        fused: the fused model's error against fp64.
        difference: of the fused model from the unfused one.
        bar: what `fused` has to keep to.
    """

    mode: str
    quantity: str
    eager: float
    fused: float
    difference: float
    bar: float

    @property
    def agrees(self) -> bool:
        return self.fused <= self.bar


@dataclass(frozen=True)
class Verification:
    """All comparisons; printing it gives a table."""

    comparisons: tuple[Comparison, ...]

    @property
    def agrees(self) -> bool:
        return all(comparison.agrees for comparison in self.comparisons)

    def __str__(self) -> str:
        lines = [f"{'mode':9} {'quantity':19} {'eager':>9} {'fused':>9} {'apart':>9}   error relative to fp64"]
        for c in self.comparisons:
            numbers = f"{c.eager:9.1e} {c.fused:9.1e} {c.difference:9.1e}"
            lines.append(f"{c.mode:9} {c.quantity:19} {numbers}   {'agrees' if c.agrees else 'DIFFERS'}")
        return "\n".join(lines)


def verify(model: nn.Module, x: Tensor) -> Verification:
    """Run copies of a fused model, fused and unfused, forward and backward, in both modes, and compare.

    Random draws (dropout, drop-path) start from the same seed in each run. The model itself, the gradients it holds and
    the random state stay as they are.

    Args:
        x: what the model takes: a batch of your own data.

    >>> import fusedres
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    >>> report = fusedres.fuse(model)
    >>> verify(model, torch.randn(4, 3, 8, 8)).agrees
    True
    """
    if not any(isinstance(module, Fused) for module in model.modules()):
        raise ValueError(
            "verify compares a fused model with itself unfused, and nothing in this one is; call fuse first"
        )
    eager, exact = copy.deepcopy(model), copy.deepcopy(model)
    unfuse(eager)
    unfuse(exact)
    comparisons = []
    for training in (True, False):
        contestants = (copy.deepcopy(exact).double(), x.double()), (copy.deepcopy(eager), x), (copy.deepcopy(model), x)
        with dispatch.any_size():
            truth, theirs, ours = (_results(contestant.train(training), given) for contestant, given in contestants)
        comparisons += _compare("training" if training else "eval", truth, theirs, ours, x.dtype)
    return Verification(tuple(comparisons))


def _results(model: nn.Module, x: Tensor) -> Results:
    """The outputs, gradients and running statistics of one step."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_(x.is_floating_point())
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        torch.manual_seed(0)
        outputs = _tensors(model(x))
        torch.manual_seed(1)
        loss = sum(((y * _weights(y)).sum() for y in outputs.values() if y.requires_grad), x.new_zeros(()))
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if x.grad is not None:
        gradients["x"] = x.grad
    statistics = {name: b for name, b in model.named_buffers() if name.endswith(("running_mean", "running_var"))}
    return {
        "outputs": {name: y.detach() for name, y in outputs.items()},
        "gradients": gradients,
        "running statistics": statistics,
    }


def _tensors(output: object) -> dict[str, Tensor]:
    """The tensors of a tensor, tuple, dict or model output."""
    leaves = pytree.tree_leaves(output)
    return {str(index): leaf for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}


def _weights(y: Tensor) -> Tensor:
    """A fixed gradient for an output, the same in every precision."""
    return torch.randn(y.shape, dtype=torch.float64).to(y.device, y.dtype)


def _compare(mode: str, truth: Results, theirs: Results, ours: Results, dtype: torch.dtype) -> Iterator[Comparison]:
    epsilon = torch.finfo(dtype).eps if dtype.is_floating_point else torch.finfo(torch.float32).eps
    for quantity, exact in truth.items():
        if not exact or (quantity == "running statistics" and mode == "eval"):
            continue
        eager, fused = relative_error(theirs[quantity], exact), relative_error(ours[quantity], exact)
        difference = relative_error(ours[quantity], theirs[quantity])
        yield Comparison(mode, quantity, eager, fused, difference, bar(quantity, eager, epsilon))


def bar(quantity: str, eager: float, epsilon: float) -> float:
    """The error against fp64 that a quantity may have where eager's is `eager`."""
    return _SLACK * eager + _EPSILONS * epsilon + (_FLIPPED_RELU if quantity == "gradients" else 0.0)


def relative_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The RMS over tensors of |found - expected| / |expected|; infinite where one misses some that the other has."""
    if found.keys() != expected.keys():
        return math.inf
    sizes = {name: value.double().norm().item() for name, value in expected.items()}
    smallest = _VANISHING * max(sizes.values())
    squares = []
    for name, value in expected.items():
        difference = (found[name].double() - value.double()).norm().item()
        squares.append((difference / max(sizes[name], smallest, _TINY)) ** 2)
    return math.sqrt(sum(squares) / len(squares))

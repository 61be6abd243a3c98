"""A step so small that calls are all its cost: a fused block runs eager's operators, forward and backward.

`benchmarks/test_checks.py` has the time that it takes beside eager.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from eager import randomise
from test_families import TIMM, TORCHVISION
from torch import Tensor, nn
from training_steps import Operations

import fusedres
from fusedres import dispatch

BLOCKS = {
    **{f"torchvision {name}": TORCHVISION[name] for name in ("basic", "basic projection", "bottleneck projection")},
    **{f"timm {name}": TIMM[name] for name in ("basic", "bottleneck avg_down")},
}


def steps(name: str, training: bool) -> tuple[Callable[[], None], Callable[[], None]]:
    """Forward and backward of a fused block, which has run once, and of its eager twin."""
    eager = BLOCKS[name]()
    randomise(eager)
    fused = copy.deepcopy(eager)
    fusedres.fuse(fused, strict=True)
    x = torch.randn(2, 8, 4, 4)
    assert "the input is small" in str(fusedres.explain(fused, x))
    return step(fused.train(training), x), step(eager.train(training), x)


def step(block: nn.Module, x: Tensor) -> Callable[[], None]:
    leaf = x.clone().requires_grad_()

    def run() -> None:
        block(leaf).sum().backward()

    run()
    return run


def operations(run: Callable[[], object]) -> Counter[str]:
    with Operations() as ran:
        run()
    return ran.count


@pytest.fixture(autouse=True)
def sizes_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "min_elements", 262_144)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("name", BLOCKS)
def test_it_runs_eagers_operators_and_no_others(name: str, training: bool) -> None:
    ours, eagers = (operations(run) for run in steps(name, training))
    assert ours == eagers

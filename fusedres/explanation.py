"""explain(model, x): which backend every op of every block took, and why not the others."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fusedres import dispatch


@dataclass(frozen=True)
class Explanation:
    """The choices of one forward, in order; printing it gives a table."""

    choices: tuple[dispatch.Choice, ...]

    def __str__(self) -> str:
        if not self.choices:
            return "no fused block ran: swap in fusedres.BasicBlock or fusedres.Bottleneck first"
        rows = [("block", "op", "backend", "why not another")]
        rows += [(c.block, c.op, c.backend, _reasons(c.objections)) for c in self.choices]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        return "\n".join(
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip()
            for row in rows
        )


def _reasons(objections: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in objections.items())


def explain(model: nn.Module, x: Tensor) -> Explanation:
    """Run a copy of `model` on `x` and say what served each op. The model itself is left as it is.

    >>> import fusedres
    >>> print(explain(fusedres.BasicBlock(3, 3), torch.randn(2, 3, 4, 4)).choices[0].op)
    bn_act
    """
    twin = copy.deepcopy(model)
    with (
        torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []),
        dispatch.recording(twin) as made,
    ):
        twin(x)
    return Explanation(tuple(made))

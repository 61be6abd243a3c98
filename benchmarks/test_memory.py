"""Peak memory against time of a training step: the memory policies beside checkpointing and a compiler's budget."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from conftest import Race, add_rates, whole
from torch import nn
from torch._functorch import config as functorch_config
from torch.utils.checkpoint import checkpoint

import fusedres
from fusedres.bench import networks
from fusedres.bench.ceilings import Ceilings
from fusedres.bench.contestants import BASELINE, ENTRIES, Entry, in_channels_last, step_of
from fusedres.bench.work import Step, Work
from fusedres.testing import import_torchvision

resnet = import_torchvision().models.resnet
BUDGET = 0.5
# model, batch, height and width
NETWORKS = (("resnet50", 16, 224), ("resnet18", 16, 224), ("cifar/resnet18", 64, 32))


def policy(name: str) -> Entry:
    def entry(model: nn.Module, work: Work) -> Step:
        twin, images = in_channels_last(model, work)
        fusedres.fuse(twin)
        fusedres.set_memory(name, twin)
        return step_of(twin, images, work)

    return entry


def checkpointed(model: nn.Module, work: Work) -> Step:
    """torch's own trade: every block is run again in the backward."""
    twin, images = in_channels_last(model, work)
    for block in twin.modules():
        if isinstance(block, resnet.BasicBlock | resnet.Bottleneck):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return step_of(twin, images, work)


def compiled(model: nn.Module, work: Work) -> Step:
    step = ENTRIES["torch.compile"](model, work)
    with functorch_config.patch(activation_memory_budget=BUDGET):
        step()  # compiles
    return step


CONTESTANTS: dict[str, Entry] = {
    BASELINE: ENTRIES["eager channels_last"],
    "fusedres fast": policy("fast"),
    "fusedres lean": policy("lean"),
    "fusedres min": policy("min"),
    "checkpoint per block": checkpointed,
    f"torch.compile, budget {BUDGET}": compiled,
}


def cases(quick: bool) -> dict[str, Work]:
    sizes = (("resnet18", 2, 64),) if quick else NETWORKS
    works = [
        Work(name, True, batch, size, dtype, torch.device("cpu"))
        for (name, batch, size), dtype in product(sizes, (torch.bfloat16, torch.float32))
        if not quick or dtype is torch.bfloat16
    ]
    return {f"memory policies, {work}": work for work in works}


def races(quick: bool) -> dict[str, list[str]]:
    names = [name for name in CONTESTANTS if not quick or not name.startswith("torch.compile")]
    return dict.fromkeys(cases(quick), names)


def test_policies(
    case: str,
    contestant: str,
    benchmark: Any,
    race: Race,
    quick: bool,
    ceiling: Callable[[torch.dtype], Ceilings],
) -> None:
    work = cases(quick)[case]
    benchmark.group = case
    entries = {name: CONTESTANTS[name] for name in races(quick)[case]}

    def build() -> Any:
        torch.manual_seed(0)
        return whole(networks.build(work.model), work, entries)

    samples = race(benchmark, case, contestant, build)
    add_rates(benchmark, work, samples, ceiling(work.dtype))

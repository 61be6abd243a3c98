"""Networks of torchvision and timm in training and inference: eager, fusedres, torch.compile and peers."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from conftest import Race, add_rates, whole
from torch import nn

from fusedres.bench import networks
from fusedres.bench.ceilings import Ceilings
from fusedres.bench.contestants import ENTRIES, FROZEN, FUSED_COMPILED, OPTIMIZED, PEERS
from fusedres.bench.work import Work

MODELS = ("resnet18", "resnet50", "timm/resnet50d", "timm/seresnet50")
QUICK_MODELS = ("resnet18", "timm/resnet10t")
# training, batch
TASKS = ((True, 16), (False, 16), (False, 1))
CIFAR, CIFAR_BATCH, CIFAR_SIZE = "cifar/resnet18", 64, 32
QUICK_TASKS = ((True, 2), (False, 2), (False, 1))
DTYPES = (torch.float32, torch.bfloat16)


@lru_cache(maxsize=1)
def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return networks.build(name)


def cases(quick: bool) -> dict[str, Work]:
    """The quick ones are small, and bf16 for the first model alone; of CIFAR's ResNet-18 the training step."""
    names, tasks, size = (QUICK_MODELS, QUICK_TASKS, 64) if quick else (MODELS, TASKS, 224)
    works = [
        Work(name, training, batch, size, dtype, torch.device("cpu"))
        for name, dtype, (training, batch) in product(names, DTYPES, tasks)
        if not quick or dtype is torch.float32 or name is names[0]
    ]
    works += [
        Work(CIFAR, True, 2 if quick else CIFAR_BATCH, CIFAR_SIZE, dtype, torch.device("cpu"))
        for dtype in DTYPES
        if not quick or dtype is torch.float32
    ]
    return {str(work): work for work in works}


def races(quick: bool) -> dict[str, list[str]]:
    names = [name for name in (*ENTRIES, *PEERS) if not quick or "torch.compile" not in name]
    trained = [name for name in names if name not in (OPTIMIZED, FROZEN, *PEERS)]
    served = [name for name in names if name != FUSED_COMPILED]
    return {case: trained if work.training else served for case, work in cases(quick).items()}


def test_model(
    case: str,
    contestant: str,
    benchmark: Any,
    race: Race,
    quick: bool,
    ceiling: Callable[[torch.dtype], Ceilings],
) -> None:
    work = cases(quick)[case]
    benchmark.group = case
    entries = {name: (ENTRIES | PEERS)[name] for name in races(quick)[case]}
    samples = race(benchmark, case, contestant, lambda: whole(build(work.model), work, entries))
    add_rates(benchmark, work, samples, ceiling(work.dtype))

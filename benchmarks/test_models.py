"""Networks of torchvision and timm, training and inference: eager, channels_last, fusedres, torch.compile, peers."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from conftest import Race, add_rates, whole
from torch import nn

from fusedres.bench import networks
from fusedres.bench.ceilings import Ceilings
from fusedres.bench.contestants import ENTRIES, PEERS
from fusedres.bench.work import Work

MODELS = ("resnet18", "resnet50", "timm/resnet50d", "timm/seresnet50")
QUICK_MODELS = ("resnet18", "timm/resnet10t")
CONTESTANTS = {**ENTRIES, **PEERS}
# name: training, batch
TASKS = {"training": (True, 16), "inference": (False, 16), "inference of one": (False, 1)}


@lru_cache(maxsize=1)
def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return networks.build(name)


@pytest.mark.parametrize("contestant", list(CONTESTANTS))
@pytest.mark.parametrize("task", list(TASKS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("index", range(len(MODELS)))
def test_model(
    index: int,
    dtype: torch.dtype,
    task: str,
    contestant: str,
    benchmark: Any,
    race: Race,
    quick: bool,
    ceiling: Callable[[torch.dtype], Ceilings],
) -> None:
    names = QUICK_MODELS if quick else MODELS
    if index >= len(names) or (quick and (contestant == "torch.compile" or (index and dtype is torch.bfloat16))):
        pytest.skip("not among the quick ones")
    model = build(names[index])
    training, batch = TASKS[task]
    size = 64 if quick else networks.image_size(model)
    work = Work(names[index], training, min(batch, 2) if quick else batch, size, dtype, torch.device("cpu"))
    benchmark.group = str(work)
    entries = {name: entry for name, entry in CONTESTANTS.items() if not quick or name != "torch.compile"}
    samples = race(benchmark, work, contestant, lambda: whole(model, work, entries))
    add_rates(benchmark, work, samples, ceiling(dtype))

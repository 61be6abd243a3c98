"""Peak memory against time of a training step: the memory policies beside checkpointing and a compiler's budget.

    python benchmarks/test_memory.py CASE CONTESTANT    the bytes that a process has which does nothing else

Beside the most that torch's allocator held, which a step's tensors explain, stands what such a process took of the
machine, the median of five: libraries, kernels' own scratch and malloc's gaps too, which differ from run to run.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from conftest import ROOT, Race, add_rates, whole
from torch import nn
from torch._functorch import config as functorch_config
from torch.utils.checkpoint import checkpoint

import fusedres
from fusedres.bench import networks
from fusedres.bench.ceilings import Ceilings
from fusedres.bench.comparison import WARM_UPS
from fusedres.bench.contestants import BASELINE, ENTRIES, Entry, in_channels_last, step_of
from fusedres.bench.work import Step, Work
from fusedres.machine import PAGES_KEPT
from fusedres.testing import import_torchvision

resnet = import_torchvision().models.resnet
BUDGET = 0.5
_PROCESSES = 5
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
    benchmark.extra_info["resident_bytes"] = None if quick else resident_bytes(case, contestant)
    entries = {name: CONTESTANTS[name] for name in races(quick)[case]}

    def build() -> Any:
        torch.manual_seed(0)
        return whole(networks.build(work.model), work, entries)

    samples = race(benchmark, case, contestant, build)
    add_rates(benchmark, work, samples, ceiling(work.dtype))


def resident_bytes(case: str, contestant: str) -> int | None:
    """The most memory that a process of its own has during a step, after its first steps; Linux alone tells."""
    if sys.platform != "linux":
        return None
    environment = {name: value for name, value in os.environ.items() if name not in PAGES_KEPT}
    command = [sys.executable, __file__, case, contestant]

    def run() -> int:
        done = subprocess.run(
            command, env=environment | {"PYTHONPATH": str(ROOT)}, check=True, stdout=subprocess.PIPE, text=True
        )
        return int(done.stdout)

    return int(median(run() for _ in range(_PROCESSES)))


def train_alone(case: str, contestant: str) -> int:
    work = (cases(quick=False) | cases(quick=True))[case]
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    step = CONTESTANTS[contestant](networks.build(work.model), work)
    for _ in range(WARM_UPS):
        step()
    ctypes.CDLL(None).malloc_trim(0)  # what building and compiling left behind
    Path("/proc/self/clear_refs").write_text("5")  # forgets the highest mark so far
    step()
    (kilobytes,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes) * 1024


if __name__ == "__main__":
    sys.stdout.write(str(train_alone(*sys.argv[1:])))

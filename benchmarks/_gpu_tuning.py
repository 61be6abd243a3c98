"""Stage `tuning`: what `python -m fusedres tune` does, at the batch sizes that the stages after it measure.

What it finds is kept in the user's cache, where every later stage, and everything else on the machine, uses it.
The CUDA lines of this file have not been run yet: it was written where there is no GPU.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple
from typing import Any

import torch
from _gpu_machine import tuned_table
from _gpu_stage import Run, release

from fusedres.bench.timing import Report
from fusedres.tuning import kernels

BATCHES = (256, 64, 32, 1)  # of `ops`, `backends` and the baselines; the largest first
SHORTEST_S = 30.0  # a shape that is begun with less might not be finished


def tune(run: Run, report: Report) -> list[str]:
    """Shape by shape: what was found is kept, and reported, when the time is up."""
    shapes = [shape for batch in run.pick(BATCHES, (2,)) for shape in kernels.shapes_at(batch)] if run.cuda else []
    seconds: dict[str, float] = {}
    report.data |= {"shapes": len(shapes), "seconds": seconds}
    for shape in shapes:
        if run.left() < run.pick(SHORTEST_S, 1.0):
            return [f"time for {len(seconds)} of {len(shapes)} shapes; the others have the defaults"]
        name = "x".join(map(str, shape))
        print(f"  {name}", file=sys.stderr, flush=True)
        before = run.left()
        path = kernels.tune_shapes([shape], stems=[shape] if shape[1:] == kernels.NORMS[0] else [], device=run.device)
        seconds[name] = before - run.left()
        table = json.loads(path.read_text())
        report.data |= {"tuned_table": tuned_table(run), "table": table, "changed": changed(run, table["entries"])}
        report.save()
        release(run)
    return []


def changed(run: Run, entries: Mapping[str, Sequence[int]]) -> list[str]:
    """The entries that are not what would be chosen without a table."""
    from fusedres.backends.triton import launch
    from fusedres.backends.triton.configurations import PASSES, default

    capability, kinds = launch.device_of(run.device).capability, {kind.name: kind for kind in PASSES}
    found = []
    for entry, config in entries.items():
        name, dtype, *_ = entry.split("/")
        if tuple(config) != astuple(default(kinds[name], capability, getattr(torch, dtype).itemsize)):
            found.append(entry)
    return found


def summary(data: dict[str, Any]) -> Iterator[str]:
    if not data.get("seconds"):
        yield "nothing was tuned: that needs CUDA"
        return
    yield f"{len(data['seconds'])} of {data['shapes']} shapes in {sum(data['seconds'].values()):.0f} s"
    yield f"{len(data['table']['entries'])} entries, {len(data['changed'])} of them not the default"

"""Stage `ranking`: whose kernels are the fastest by size class, which the dispatcher goes by from then on.

What it finds is kept in the user's cache, class by class, as `python -m fusedres tune` does after the configurations.
The CUDA lines of this file have not been run yet: it was written where there is no GPU.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from _gpu_stage import Run

from fusedres.backends import ranking
from fusedres.bench.timing import Report
from fusedres.tuning import backends


def rank(run: Run, report: Report) -> list[str]:
    if not run.cuda:
        return []

    def keep(done: int, total: int) -> None:
        report.data |= {"classes": [done, total], "table": json.loads(ranking.table().path.read_text())}
        report.save()

    backends.rank(run.pick(backends.SHAPES, ((2, 8, 4, 4),)), device=run.device, progress=keep)
    return []


def summary(data: dict[str, Any]) -> Iterator[str]:
    if "table" not in data:
        yield "nothing was ranked: that needs CUDA"
        return
    done, total = data["classes"]
    yield f"{done} of {total} classes"
    for entry, times in data["table"]["entries"].items():
        yield f"  {entry}: " + ", ".join(f"{name} {1e3 * ms:.1f} us" for name, ms in sorted(times.items()))

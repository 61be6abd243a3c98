"""Stage `traffic`: what the CUDA kernels read of memory and its cache, counted by ncu: x once, where it fits on chip.

The CUDA lines of this file have not been run yet: it was written where there is no GPU.
"""

from __future__ import annotations

import csv
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _gpu_stage import Run

from fusedres.bench.timing import Report

CASE = Path(__file__).parent / "traffic_case.py"
# bf16, channels_last: from 3 to 24 MB, and one that is far too large to stay on chip.
SHAPES = (
    (64, 512, 7, 7),
    (32, 256, 14, 14),
    (256, 512, 7, 7),
    (64, 128, 28, 28),
    (120, 128, 28, 28),
    (256, 256, 56, 56),
)
# Tensors of x's size that a kernel has to read (x and the residual; dy, x and bits), and up to which size only once:
# the forward keeps x on chip, the backward x and dy.
READS = {"forward_kernel": (2.0, 25e6), "backward_kernel": (2 + 1 / 16, 13e6)}
DRAM, CACHE = "dram__bytes_read.sum", "lts__t_sectors_srcunit_tex_op_read.sum"
SECTOR_BYTES = 32
# In tensors, beside those: constants; of the cache every block reads all parts' results too.
SLACK = {"memory_bytes": 0.2, "cache_bytes": 0.8}
SHORTEST_S = 20.0
OUTPUT_CHARS = 3000


def traffic(run: Run, report: Report) -> list[str]:
    if not run.cuda:
        return []
    if shutil.which("ncu") is None:
        return ["ncu must be on PATH"]
    found: list[str] = []
    report.data["shapes"] = records = {}
    for shape in run.pick(SHAPES, SHAPES[:1]):
        if run.left() < SHORTEST_S:
            return [*found, f"time for {len(records)} of {len(SHAPES)} shapes"]
        name = "x".join(map(str, shape))
        counted = count(shape, run.left())
        records[name] = counted
        report.save()
        found += problems(name, math.prod(shape) * 2, counted)
    return found


def count(shape: tuple[int, ...], seconds: float) -> dict[str, Any]:
    """Bytes read by every kernel of a step, of memory and of its cache; why there are none under "error"."""
    command = ["ncu", "--csv", "--page", "raw", "--print-units", "base", "--target-processes", "all"]
    command += ["--clock-control", "none"]
    command += ["--kernel-name", "regex:(forward|backward)_kernel", "--metrics", f"{DRAM},{CACHE}"]
    try:
        done = subprocess.run(
            [*command, sys.executable, str(CASE), *map(str, shape)], capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return {"error": f"stopped after {seconds:.0f} s"}
    kernels = list(parse(done.stdout))
    return {"kernels": kernels} if kernels else {"error": (done.stdout + done.stderr)[-OUTPUT_CHARS:]}


def parse(printed: str) -> Iterator[dict[str, Any]]:
    """The kernels in ncu's CSV: what the program and ncu say comes before it, and a row of units first in it."""
    lines = printed.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    for row in csv.DictReader(lines[first:]):
        if row["ID"]:
            dram, sectors = (float(row[metric].replace(",", "")) for metric in (DRAM, CACHE))
            yield {"kernel": row["Kernel Name"], "memory_bytes": dram, "cache_bytes": sectors * SECTOR_BYTES}


def problems(name: str, size: int, counted: dict[str, Any]) -> Iterator[str]:
    """What is not as it should be of one shape, whose tensors have `size` bytes."""
    if "error" in counted:
        yield f"{name}: ncu counted nothing: {counted['error'].strip().splitlines()[-1:]}"
        return
    for kernel, (tensors, most) in READS.items():
        launches = [row for row in counted["kernels"] if kernel in row["kernel"]]
        if not launches:
            yield f"{name}: no {kernel} ran"
        for place, slack in SLACK.items():
            read = sum(row[place] for row in launches) / size
            if size <= most and read > tensors + slack:
                yield f"{name}: {kernel} reads {read:.2f} tensors ({place}), {tensors:.2f} wanted"


def summary(data: dict[str, Any]) -> Iterator[str]:
    if "shapes" not in data:
        yield "nothing was counted: that needs CUDA and ncu"
    for name, counted in data.get("shapes", {}).items():
        for row in counted.get("kernels", []):
            read = f"{row['memory_bytes'] / 1e6:.1f} MB of memory, {row['cache_bytes'] / 1e6:.1f} MB of cache"
            yield f"{name}: {row['kernel'].partition('<')[0]} reads {read}"

"""What docs/measured.md says of GPUs: every committed report of gpu.py, or that there is none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpu

NOTHING = (
    "Nothing on a GPU. The Triton and the CUDA kernels have not been timed, nor been run on one; what is known of them "
    "without is what compilers make of them ([compiled.md](compiled.md), [compiled_cuda.md](compiled_cuda.md)) and the "
    "bytes that each has to move ([math.md](math.md)). `benchmarks/gpu.py` measures them."
)


def reports(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Of every stage, from a file of its own or a joined one."""
    for path in sorted(folder.glob("*/*.json")):
        data = json.loads(path.read_text())
        if "benchmarks" not in data:
            yield from ((path, report) for report in ([data] if "stage" in data else data.values()))


def sections(folder: Path) -> Iterator[str]:
    found = [(path, report) for path, report in reports(folder) if report["device"] == "cuda" and not report["tiny"]]
    if not found:
        yield from ("## Not measured", "", NOTHING, "")
    for path, report in found:
        facts = f"{report['device_name']}, torch {report['torch']}, commit {report['commit']}, {report['date']}, by"
        yield from (f"## {path.parent.name}, {report['stage']}: {report['status']}", "", facts, "")
        yield from (f"    {report['command']}", "", "```")
        yield from (f"problem: {problem}" for problem in report.get("problems", []))
        yield from gpu.STAGES[report["stage"]].summarize(report)
        yield from ("```", "")

"""Stage `sanitizers`: the CUDA kernels under each tool of compute-sanitizer, after a canary that it has to catch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _gpu_stage import Run

from fusedres.bench.timing import Report

FOLDER = Path(__file__).parent
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
CAUGHT = 9  # the exit status that the tool is told to give
OUTPUT_CHARS = 3000


def sanitizers(run: Run, report: Report) -> list[str]:
    if not run.cuda:
        return []
    missing = [tool for tool in ("nvcc", "compute-sanitizer") if shutil.which(tool) is None]
    if missing:
        return [f"{' and '.join(missing)} must be on PATH"]
    found: list[str] = []
    report.data["tools"] = {}
    with tempfile.TemporaryDirectory() as folder:
        canary = Path(folder) / "canary"
        subprocess.run(["nvcc", "-arch=native", "-o", str(canary), str(FOLDER / "canary.cu")], check=True)
        cases = [sys.executable, str(FOLDER / "sanitized_cases.py"), str(run.pick(60, 4))]
        subprocess.run(cases, check=True)  # which builds the library, where that is still to do
        for index, tool in enumerate(TOOLS):
            seconds = run.left() / (len(TOOLS) - index)
            caught = sanitize(tool, [str(canary), tool], seconds)
            ours = sanitize(tool, cases, seconds)
            report.data["tools"][tool] = {"canary": caught, "cases": ours}
            report.save()
            if caught["status"] != CAUGHT:
                found.append(f"{tool} does not catch its canary: what it says of the kernels shows nothing")
            if ours["status"] != 0:
                found.append(f"{tool}: the cases ended with status {ours['status']}")
    return found


def sanitize(tool: str, command: list[str], seconds: float) -> dict[str, Any]:
    """The exit status under a tool, None where time ran out, and the end of what was printed."""
    argv = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(CAUGHT), "--target-processes", "all"]
    # Every tensor in an allocation of its own: inside torch's cache nothing is out of bounds.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run([*argv, *command], env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"status": None, "output": f"stopped after {seconds:.0f} s"}
    return {"status": done.returncode, "output": (done.stdout + done.stderr)[-OUTPUT_CHARS:]}


def summary(data: dict[str, Any]) -> Iterator[str]:
    for tool, found in data.get("tools", {}).items():
        verdict = {0: "nothing found", CAUGHT: "ERRORS", None: "out of time"}
        yield f"{tool}: {verdict.get(found['cases']['status'], 'did not run')}"

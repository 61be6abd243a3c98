"""Everything that only a GPU can tell, in stages of less than nine minutes.

    python benchmarks/gpu.py --out results                      all stages, as far as --minutes reaches
    python benchmarks/gpu.py --out results --stage suite        one of them
    python benchmarks/gpu.py --out dry --device cpu --tiny      the same code in small, where there is no GPU

It runs from a checkout, nothing installed. The stages come in the order of STAGES: what the machine is, whether the
kernels are right, tuning, and then what is timed, which uses what tuning found, of this run or of an earlier one; every
report has the digest of the table in use. Each stage is a process of its own, stopped when its time is up; it writes
OUT/<stage>.json as it goes, so whatever ends it, what was measured by then is kept. At the end those of one subject are
joined, into eight files or fewer. The settings of the device are only read.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

import _gpu_backends as backends
import _gpu_baseline as baseline
import _gpu_convolutions as convolutions
import _gpu_kernels as kernels
import _gpu_machine as machine
import _gpu_ops as ops
import _gpu_profile as profile
import _gpu_ranking as ranking
import _gpu_sanitizers as sanitizers
import _gpu_suite as suite
import _gpu_traffic as traffic
import _gpu_tuning as tuning
import torch
from _gpu_stage import Run, one_line

from fusedres.bench.timing import Report

STAGE_S = 535.0  # under nine minutes, the process's start and end included
START_S = 8.0  # what a process has spent before it reads its clock
SHORTEST_S = 20.0  # a stage with less than this can't tell anything
DONE, FAILED, OUT_OF_TIME, INTERRUPTED = "done", "failed", "out of time", "interrupted"


@dataclass(frozen=True)
class Stage:
    """`measure` fills the report and returns what went wrong; `summarize` reads the written file's data."""

    measure: Callable[[Run, Report], list[str]]
    summarize: Callable[[dict[str, Any]], Iterator[str]]


STAGES = {
    "env": Stage(machine.env, machine.env_summary),
    "ceilings": Stage(machine.ceilings, machine.ceilings_summary),
    "suite": Stage(suite.suite, suite.suite_summary),
    "sanitizers": Stage(sanitizers.sanitizers, sanitizers.summary),
    "kernels-triton": Stage(partial(kernels.kernels, "triton"), kernels.summary),
    "kernels-cuda": Stage(partial(kernels.kernels, "cuda"), kernels.summary),
    "tuning": Stage(tuning.tune, tuning.summary),
    "ranking": Stage(ranking.rank, ranking.summary),
    "ops": Stage(ops.ops, ops.summary),
    "backends": Stage(backends.backends, backends.summary),
    "convolutions": Stage(convolutions.convolutions, convolutions.summary),
    "traffic": Stage(traffic.traffic, traffic.summary),
    "baseline-train-resnet50": Stage(partial(baseline.train, "resnet50"), baseline.summary),
    "baseline-train-resnet18": Stage(partial(baseline.train, "resnet18"), baseline.summary),
    "baseline-train-small": Stage(baseline.train_small, baseline.summary),
    "baseline-infer": Stage(baseline.infer, baseline.summary),
    "profile": Stage(profile.step_profile, profile.summary),
}
# What stands in one file; any other stage has its own.
JOINED = {
    "machine": ("env", "ceilings"),
    "correctness": ("suite", "sanitizers", "kernels-triton", "kernels-cuda"),
    "tables": ("tuning", "ranking"),
    "kernel-times": ("ops", "backends", "convolutions", "traffic"),
    "models": ("baseline-train-resnet50", "baseline-train-resnet18", "baseline-train-small", "baseline-infer"),
}


def main() -> int:
    options = parse()
    if options.worker:
        return work(options.worker, options)
    signal.signal(signal.SIGTERM, interrupt)
    options.out.mkdir(parents=True, exist_ok=True)
    stop_at = time.monotonic() + options.minutes * 60
    statuses: dict[str, str] = {}
    for name in options.stage or STAGES:
        seconds = min(STAGE_S, stop_at - time.monotonic())
        if seconds < SHORTEST_S:
            statuses[name] = f"skipped: the {options.minutes:g} minutes are spent"
            continue
        statuses[name] = conduct(name, seconds, options)
        if statuses[name] == INTERRUPTED:
            break
    summary = "\n".join(summarize(statuses, options))
    join(options.out)
    print(summary)
    if INTERRUPTED in statuses.values():
        return 130
    return int(any(status in (FAILED, OUT_OF_TIME) for status in statuses.values()))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON files; made if absent")
    parser.add_argument("--stage", action="append", choices=STAGES, help="run this one only; may be repeated")
    parser.add_argument("--minutes", type=float, default=25, help="no stage begins, or goes on, after this (25)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu proves the code only")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes, to try this program")
    parser.add_argument("--worker", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device; to try the program without one: --device cpu --tiny")
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu measures nothing of interest at full size: add --tiny")
    return options


def interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def conduct(name: str, seconds: float, options: argparse.Namespace) -> str:
    """Run a stage as a process group of its own, so that what it starts ends with it; gives its status."""
    print(f"{name}: at most {seconds:.0f} s", file=sys.stderr, flush=True)
    (options.out / f"{name}.json").unlink(missing_ok=True)
    command = [sys.executable, sys.argv[0], "--out", str(options.out), "--device", options.device]
    command += ["--worker", name, "--seconds", str(seconds)] + ["--tiny"] * options.tiny
    process = subprocess.Popen(command, start_new_session=True)
    status = None
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        status = OUT_OF_TIME
    except KeyboardInterrupt:
        status = INTERRUPTED
    finally:
        end_group(process.pid)
        process.wait()
    return close_report(name, status, process.returncode, options)


def end_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def close_report(name: str, status: str | None, exit_status: int, options: argparse.Namespace) -> str:
    """The status a stage wrote itself; where it was ended before that, the one given, put into its file."""
    path = options.out / f"{name}.json"
    data = json.loads(path.read_text()) if path.exists() else {"stage": name, "status": "running"}
    if status is None and data["status"] != "running":
        return data["status"]
    report = Report(path, **data)
    report.data["status"] = status or FAILED
    if status is None:
        report.data["problems"] = [f"the stage's process ended with status {exit_status}"]
    report.save()
    return str(report.data["status"])


def work(name: str, options: argparse.Namespace) -> int:
    """One stage, in its own process."""
    signal.alarm(int(options.seconds) + 60)  # if nobody is left to end it
    deadline = time.monotonic() + options.seconds - START_S
    run = Run(torch.device(options.device), options.tiny, deadline)
    header = {"stage": name, "status": "running", "command": command_line(name, options)}
    report = Report(options.out / f"{name}.json", **header, **machine.identity(run))
    try:
        found = STAGES[name].measure(run, report)
        report.data |= {"status": FAILED if found else DONE, "problems": found}
    except Exception as error:
        print(traceback.format_exc(), file=sys.stderr)
        report.data |= {
            "status": FAILED,
            "problems": [one_line(error)],
            "traceback": traceback.format_exc(),
        }
    report.save()
    return int(report.data["status"] == FAILED)


def command_line(name: str, options: argparse.Namespace) -> str:
    """What repeats a stage from the root of any checkout."""
    words = ["python benchmarks/gpu.py --out OUT", f"--device {options.device}", f"--stage {name}"]
    return " ".join(words + ["--tiny"] * options.tiny)


def join(out: Path) -> None:
    """Put the stages' reports of one subject into one file, beside those of earlier runs."""
    for subject, stages in JOINED.items():
        reports = [out / f"{name}.json" for name in stages]
        found = {path.stem: json.loads(path.read_text()) for path in reports if path.exists()}
        if not found:
            continue
        path = out / f"{subject}.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        Report(path, **{**before, **found})
        for report in reports:
            report.unlink(missing_ok=True)


def summarize(statuses: dict[str, str], options: argparse.Namespace) -> Iterator[str]:
    """What a reader wants to see last."""
    for name, status in statuses.items():
        path = options.out / f"{name}.json"
        data = json.loads(path.read_text()) if not status.startswith("skipped") else {}
        where = f" ({data.get('device_name')})" if data else ""
        yield f"\n== {name}: {status}{where}{' TINY' if options.tiny else ''}"
        yield from (f"problem: {problem}" for problem in data.get("problems", []))
        if data:
            yield from STAGES[name].summarize(data)


if __name__ == "__main__":
    sys.exit(main())

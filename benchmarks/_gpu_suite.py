"""Stage `suite`: the project's own tests on the device, in a process of their own."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from _gpu_stage import ROOT, Run

from fusedres.bench.timing import Report

LONGEST_S = 490.0
GRACE_S = 30.0  # for an interrupted pytest to end its workers and write its results
WORKERS = min(12, max(4, (os.cpu_count() or 1) - 2))  # each one holds a CUDA context, and compiles kernels
MESSAGE_CHARS = 3000
LISTED = 200


def suite(run: Run, report: Report) -> list[str]:
    plugins = {name: importlib.util.find_spec(name) is not None for name in ("xdist", "hypothesis")}
    seconds = min(LONGEST_S, run.left() - GRACE_S - 5)
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "junit.xml"
        tests = run.pick("tests", "tests/test_catalogue.py")
        command = pytest_command(tests, xml, parallel=plugins["xdist"] and not run.tiny)
        report.data |= {"plugins": plugins, "pytest_command": command, "seconds_allowed": seconds}
        report.save()
        report.data["pytest_exit"], report.data["cut_short"] = run_tests(command, run, seconds)
        if not xml.exists():
            why = "was still collecting when its time was up" if report.data["cut_short"] else "failed to start"
            return [f"no results: pytest {why}; its output is above"]
        report.data |= junit_results(xml)
    return problems(report.data)


def suite_summary(data: dict[str, Any]) -> Iterator[str]:
    if data.get("counts"):
        yield ", ".join(f"{count} {outcome}" for outcome, count in data["counts"].items())
        for failure in data["failures"][:10]:
            yield f"{failure['outcome']}: {failure['test']}: {failure['message'].splitlines()[0][:120]}"
    absent = [name for name, present in data.get("plugins", {}).items() if not present]
    if absent:
        yield f"not installed here: {', '.join(absent)}"


def pytest_command(tests: str, xml: Path, *, parallel: bool) -> list[str]:
    """Warnings stay warnings and any pytest will do: versions here may not be those that the project pins.

    A test file whose imports are missing is an error of its own and doesn't stop the others.
    """
    command = [sys.executable, "-m", "pytest", tests, "-q", "-p", "no:cacheprovider", f"--junitxml={xml}"]
    command += ["-o", "minversion=0", "-W", "default", "--continue-on-collection-errors", "--tb=short"]
    return [*command, "-n", str(WORKERS)] if parallel else command


def run_tests(command: list[str], run: Run, seconds: float) -> tuple[int | None, bool]:
    """Exit status, and whether time ran out; pytest is then interrupted, which lets it write its results."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "FUSEDRES_TEST_DEVICE": run.device.type, "PYTHONPATH": path}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=sys.stderr) as tests:
        try:
            return tests.wait(seconds), False
        except subprocess.TimeoutExpired:
            tests.send_signal(signal.SIGINT)
        try:
            return tests.wait(GRACE_S), True
        except subprocess.TimeoutExpired:
            tests.kill()
            return None, True


def junit_results(xml: Path) -> dict[str, object]:
    """Counts by outcome, failures with their messages, why tests were skipped, and the slowest ones."""
    cases = list(ElementTree.parse(xml).iter("testcase"))
    counts: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    failures: list[dict[str, str]] = []
    for case in cases:
        outcome = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        counts["passed" if outcome is None else outcome.tag] += 1
        if outcome is None:
            continue
        if outcome.tag == "skipped":
            skipped[outcome.get("message", "")] += 1
        else:
            text = f"{outcome.get('message', '')}\n{outcome.text or ''}"
            failures.append({"test": test_id(case), "outcome": outcome.tag, "message": text[:MESSAGE_CHARS]})
    slowest = sorted(cases, key=lambda case: float(case.get("time", 0)), reverse=True)[:20]
    return {
        "counts": dict(counts),
        "failures": failures[:LISTED],
        "failures_left_out": max(0, len(failures) - LISTED),
        "skipped": dict(skipped.most_common(LISTED)),
        "slowest_s": {test_id(case): float(case.get("time", 0)) for case in slowest},
    }


def test_id(case: ElementTree.Element) -> str:
    return f"{case.get('classname')}::{case.get('name')}"


def problems(data: dict[str, Any]) -> list[str]:
    broken = data["counts"].get("failure", 0) + data["counts"].get("error", 0)
    found = [f"{broken} tests failed"] if broken else []
    if data["cut_short"]:
        found.append(f"stopped after {data['seconds_allowed']:.0f} s, with {sum(data['counts'].values())} tests done")
    elif not broken and data["pytest_exit"] != 0:
        found.append(f"pytest ended with status {data['pytest_exit']}")
    return found

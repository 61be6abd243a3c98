"""benchmarks/gpu.py where there is no GPU: every stage in small, what they leave, and those that break."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
# The program with two more stages, one that raises and one whose process dies; workers run the same file.
PROGRAM = f"""
import os, sys
sys.path.insert(0, {str(BENCHMARKS)!r})
import gpu

def silent(data):
    yield from ()

def raises(run, report):
    raise ValueError("broken on purpose")

def dies(run, report):
    report.data["begun"] = True
    report.save()
    os._exit(7)

stages = dict(gpu.STAGES)
gpu.STAGES.clear()
gpu.STAGES.update(raises=gpu.Stage(raises, silent), dies=gpu.Stage(dies, silent), **stages)
sys.exit(gpu.main())
"""


def reports(out: Path) -> Iterator[dict[str, object]]:
    """Of every stage, its own file's or one of those in a joined file."""
    for path in out.iterdir():
        data = json.loads(path.read_text())
        yield from [data] if "stage" in data else data.values()


def test_every_stage_runs_also_after_one_that_breaks(tmp_path) -> None:
    program, out = tmp_path / "program.py", tmp_path / "out"
    program.write_text(PROGRAM)
    command = [sys.executable, str(program), "--out", str(out), "--device", "cpu", "--tiny", "--minutes", "60"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    statuses = dict(re.findall(r"^== (\S+): (\w+)", done.stdout, re.MULTILINE))
    assert list(statuses)[:2] == ["raises", "dies"] and len(statuses) == 19
    broken = {name for name, status in statuses.items() if status != "done"}
    assert broken == {"raises", "dies"}, done.stdout + done.stderr
    assert done.returncode == 1

    files = list(out.iterdir())
    assert len(files) <= 8 and all(path.suffix == ".json" and path.stat().st_size < 16e6 for path in files)
    assert {(report["stage"], report["status"]) for report in reports(out)} == set(statuses.items())
    for report in reports(out):
        assert report["torch"] == torch.__version__ and report["tiny"] is True
        assert str(report["command"]).endswith(f"--device cpu --stage {report['stage']} --tiny")
        assert {"commit", "date", "device_name", "tuned_table", "problems"} <= report.keys()

    nothing_before, *sections = re.split(r"^== ", done.stdout, flags=re.MULTILINE)
    assert nothing_before.strip() == ""
    told = {section.partition(":")[0]: section for section in sections}
    assert "problem: ValueError: broken on purpose" in told["raises"]
    assert "problem: the stage's process ended with status 7" in told["dies"]
    for name, words in {
        "ceilings": "TB/s",
        "kernels-triton": "right",
        "ops": "x compile",
        "tuning": "needs CUDA",
        "ranking": "needs CUDA",
        "traffic": "needs CUDA",
        "convolutions": "without triton: Unserved",
    }.items():
        assert words in told[name]


@pytest.fixture
def stage(monkeypatch):
    """The module of the stage, which stands beside the program and not in a package."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import _gpu_tuning

    return _gpu_tuning


class Imaginary:
    """A run on a GPU that isn't there, until its time is up."""

    cuda, tiny, device = True, False, torch.device("meta")

    def __init__(self, seconds: list[float]) -> None:
        self.seconds = seconds

    def left(self) -> float:
        return self.seconds[0] if len(self.seconds) == 1 else self.seconds.pop(0)

    def pick(self, full, tiny):
        return full


def test_tuning_reports_the_table_that_later_stages_use(stage, monkeypatch, tmp_path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from fusedres.backends.triton import launch, tuned
    from fusedres.backends.triton.configurations import APPLY, default
    from fusedres.backends.triton.view import View

    name, asked = "NVIDIA Imaginary 9000", []
    monkeypatch.setenv("FUSEDRES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuned, "_read", {})
    monkeypatch.setattr(launch, "device_of", lambda device: launch.Device(name, 90, 132))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    first = default(APPLY, 90, 2)
    other = next(config for config in APPLY.configs if config != first)

    def tune(shapes, *, stems, device):
        asked.extend(shapes)
        assert stems == [shape for shape in shapes if shape[1:] == (64, 112, 112)]
        key = tuned.key(APPLY, View(1, 99, len(asked), True), torch.bfloat16)
        return tuned.save(name, {key: first if len(asked) == 1 else other})

    monkeypatch.setattr(stage.kernels, "tune_shapes", tune)
    report = SimpleNamespace(data={}, save=lambda: None)
    run = Imaginary([100.0] * 9 + [1.0])
    (problem,) = stage.tune(run, report)
    assert problem.startswith("time for 3 of 48 shapes") and asked == stage.kernels.shapes_at(256)[:3]
    assert report.data["tuned_table"] == stage.tuned_table(run)
    assert report.data["table"] == json.loads(tuned.path_of(name).read_text())
    assert [key.split("/")[3] for key in report.data["changed"]] == ["2", "3"]
    lines = list(stage.summary(report.data))
    assert lines[0].startswith("3 of 48 shapes") and lines[1] == "3 entries, 2 of them not the default"

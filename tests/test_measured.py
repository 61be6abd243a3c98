"""The published numbers are those of the committed results, on the page, in the README and in the charts."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

FILE = Path(__file__).parents[1] / "benchmarks" / "measured.py"
_spec = importlib.util.spec_from_file_location("measured", FILE)
measured = importlib.util.module_from_spec(_spec)
sys.modules["measured"] = measured
_spec.loader.exec_module(measured)

RUNS = measured.runs()


def test_the_page_has_the_committed_numbers():
    assert measured.PAGE.read_text() == measured.page(RUNS), "run `make measured`"


def test_the_readme_has_the_committed_numbers():
    text = measured.README.read_text()
    assert all(marker in text for marker in measured.MARKERS)
    assert text == measured.with_numbers(text, RUNS), "run `make measured`"


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.path.stem)
def test_every_chart_is_of_the_committed_results(run):
    for path in run.pictures():
        with Image.open(path) as chart:
            assert chart.text[measured.DIGEST] == run.digest, "run `make measured`"
            assert 900 < chart.width < 1400


def test_no_chart_is_left_of_results_that_are_gone():
    assert {path.name for path in measured.CHARTS.iterdir()} == {path.name for run in RUNS for path in run.pictures()}


def test_a_number_that_was_changed_by_hand_is_noticed():
    first, last = measured.MARKERS
    readme = measured.with_numbers(f"# Title\n{first}\nold\n{last}\nrest\n", RUNS)
    assert readme.startswith("# Title\n") and readme.endswith(f"{last}\nrest\n") and "old" not in readme
    race, *_ = (
        race
        for run in RUNS
        for race in run.races
        if race.name.startswith("resnet50, training step")
        and "fp32" in race.name
        and run.conditions["malloc"] == "pages kept"
    )
    ours = f"| {race.milliseconds('fusedres'):.4g} |"
    best = {
        own: min(race.milliseconds(name) for name in race.entries if (name in race.ours) == own)
        for own in (True, False)
    }
    assert ours in readme and f"**{best[False] / best[True]:.2f}** |" in readme
    assert measured.with_numbers(readme.replace(ours, "| 1.234 |"), RUNS) == readme


def result(contestant, speedup, low, high):
    facts = {"speedup": speedup, "speedup_95": [low, high], "malloc": "default", "threads": 3, "images/s": 9.0}
    facts["share of matmul peak"] = 0.5
    return {
        "group": "a network",
        "fullname": f"benchmarks/test_models.py::test_model[a network-{contestant}]",
        "params": {"contestant": contestant},
        "extra_info": facts,
        "stats": {"median": 0.5, "data": [0.5, 0.5, 0.5]},
    }


def test_lost_races_and_rates_are_told(tmp_path):
    path = tmp_path / "device" / "2026-01-01-models.json"
    path.parent.mkdir()
    found = [result("eager", 1.0, 1.0, 1.0), result("fusedres", 0.9, 0.8, 0.95), result("fusedres lean", 1.0, 0.9, 1.1)]
    command = "pytest benchmarks/test_models.py --benchmark-only"
    path.write_text(json.dumps({"benchmarks": found, "command": f"{command} -k resnet18"}))
    page = measured.page([measured.Run.read(path)])
    _, _, lost = page.partition("## When it is slower")
    assert "- a network, fusedres: **0.90** [0.80, 0.95] (device, 2026-01-01-models)\n\nNeither faster" in lost
    assert lost.endswith("- a network, fusedres lean: **1.00** [0.90, 1.10] (device, 2026-01-01-models)\n")
    assert (
        "| a network | 500.000 | 500.000 | 500.000 | **0.90** [0.80, 0.95] | **1.00** [0.90, 1.10] | 9.0 (50%) |"
        in page
    )
    assert f"    OMP_NUM_THREADS=3 {command} -k resnet18 --benchmark-json=FILE" in page
    path.write_text(json.dumps({"benchmarks": found}))
    assert f"    OMP_NUM_THREADS=3 {command} --benchmark-json=FILE" in measured.page([measured.Run.read(path)])


def test_the_fastest_of_ours_is_told_beside_every_other(tmp_path):
    path = tmp_path / "device" / "2026-01-01-models.json"
    path.parent.mkdir()
    times = {"eager": 3.0, "fusedres": 2.0, "fusedres.optimize": 1.0, "openvino": 0.5, "torch.compile": 2.0}
    found = [result(name, 3.0 / time, 3.0 / time, 3.0 / time) for name, time in times.items()]
    for entry, time in zip(found, times.values(), strict=True):
        entry["stats"] = {"median": time, "data": [time, time, time]}
    found[-1]["stats"]["data"] = [0.9, 2.0, 2.1]
    found[2]["extra_info"]["error outputs"] = 0.00345
    path.write_text(json.dumps({"benchmarks": found}))
    page = measured.page([measured.Run.read(path)])
    beside = "| a network | fusedres.optimize | **0.50** [0.50, 0.50] | **2.00** [0.90, 2.10] |"
    assert (
        f"| race | fastest of ours | openvino / it [95 %] | torch.compile / it [95 %] |\n|---|---|---|---|\n{beside}"
        in page
    )
    _, _, lost = page.partition("## When it is slower")
    where = "(device, 2026-01-01-models)"
    assert f"\n\n- a network, fusedres.optimize beside openvino: **0.50** [0.50, 0.50] {where}\n\nNeither" in lost
    assert f"- a network, fusedres.optimize beside torch.compile: **2.00** [0.90, 2.10] {where}" in lost
    assert "| a network |  |  | 3.45e-03 |  |  |" in page


IN_BFLOAT16 = [(run, race) for run in RUNS for race in run.races if "bf16" in race.name and "inference" in race.name]


@pytest.mark.parametrize("run, race", IN_BFLOAT16, ids=lambda case: getattr(case, "name", None) or case.path.stem)
def test_in_bfloat16_outputs_are_as_exact_as_a_compilers(run, race):
    errors = {name: entry["extra_info"]["error outputs"] for name, entry in race.entries.items()}
    assert errors["fusedres.optimize"] <= errors["torch.compile, freezing"]


def test_memory_is_told_beside_time_as_far_as_it_was_counted(tmp_path):
    path = tmp_path / "device" / "2026-01-01-memory.json"
    path.parent.mkdir()
    found = [result("eager", 1.0, 1.0, 1.0), result("fusedres min", 0.9, 0.8, 0.95)]
    for entry, peak, resident in zip(found, (8e6, 4e6), (5e7, 4e7), strict=True):
        entry["group"] = "memory policies, a network"
        entry["extra_info"] |= {"peak_bytes": peak, "resident_bytes": resident}
    path.write_text(json.dumps({"benchmarks": found}))
    page = measured.page([measured.Run.read(path)])
    assert (
        "| memory policies, a network | ms | peak MB | resident MB |\n|---|---|---|---|\n| eager | 500 | 8 | 50 |"
        in page
    )
    for entry in found:
        entry["extra_info"]["resident_bytes"] = None
    path.write_text(json.dumps({"benchmarks": found}))
    page = measured.page([measured.Run.read(path)])
    assert "| memory policies, a network | ms | peak MB |\n|---|---|---|\n| eager | 500 | 8 |\n" in page


def test_the_page_says_that_nothing_was_measured_on_a_gpu_or_what_was(tmp_path):
    sections = measured._gpu_page.sections
    assert "Nothing on a GPU." in "\n".join(sections(tmp_path)) and "Nothing on a GPU." in measured.PAGE.read_text()
    facts = {
        "device": "cuda",
        "tiny": False,
        "device_name": "NVIDIA Imaginary",
        "torch": "2",
        "commit": "c",
        "date": "d",
    }
    ops = {**facts, "stage": "ops", "status": "failed", "command": "python gpu.py", "problems": ["too slow"]}
    tuning = {**facts, "stage": "tuning", "status": "done", "command": "python gpu.py"}
    (tmp_path / "imaginary").mkdir()
    (tmp_path / "imaginary" / "kernel-times.json").write_text(json.dumps({"ops": ops}))
    (tmp_path / "imaginary" / "tuning.json").write_text(json.dumps(tuning))
    (tmp_path / "imaginary" / "rehearsal.json").write_text(json.dumps({**tuning, "tiny": True, "status": "rehearsed"}))
    page = "\n".join(sections(tmp_path))
    assert "Nothing on a GPU." not in page and "rehearsed" not in page
    assert "## imaginary, ops: failed" in page and "problem: too slow" in page and "bn_act is served by" in page
    assert "## imaginary, tuning: done" in page and "NVIDIA Imaginary, torch 2, commit c, d, by" in page

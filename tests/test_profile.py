"""python -m fusedres profile: every moment belongs to one class and one layer, before and after fuse."""

import json
import sys

import pytest
import small_models
import torch
from torchvision_models import torchvision

from fusedres import cli
from fusedres.bench import comparison, profiling
from fusedres.bench.ceilings import Ceilings
from fusedres.bench.contestants import CHANNELS_LAST, ENTRIES, FUSED
from fusedres.bench.roofline import Design, layers
from fusedres.bench.work import Work

CEILINGS = Ceilings(copy=1e10, matmul=1e11)


@pytest.fixture
def profiles(kernels):
    """The tiny model, eager and on the Python kernels."""
    work = Work("tiny", True, 4, 16, torch.float32, torch.device("cpu"))
    model = small_models.tiny()
    entries = {name: ENTRIES[name] for name in (CHANNELS_LAST, FUSED)}
    steps = comparison.prepare(model, work, entries, comparison.begin(work), lambda name: None)
    return model, work, *(profiling.profile(step, work.device, steps=1) for step in steps.values())


def test_classes_and_layers_add_up(profiles):
    _, _, eager, fused = profiles
    for profile in (eager, fused):
        assert profile.classes["conv"] == pytest.approx(sum(profile.convolutions.values()))
        rest = sum(profile.classes.get(name, 0.0) for name in ("bn", "add", "relu", "fused"))
        assert rest == pytest.approx(sum(profile.elementwise.values()))
    assert "fused" not in eager.classes and eager.classes["bn"] > 0 and eager.classes["relu"] > 0
    assert fused.classes["fused"] > 0 and "bn" not in fused.classes and "relu" not in fused.classes


def test_every_layer_of_the_roofline_is_found_in_the_profile(profiles):
    model, work, eager, fused = profiles
    rows = list(profiling.rows(model, work, eager, fused, CEILINGS))
    counted = layers(model, (4, 3, 16, 16), training=True, dtype=torch.float32)
    assert sum(row.count for row in rows) == sum(layer.kind != "linear" for layer in counted)
    assert all(row.eager > 0 and row.fused > 0 and row.possible > 0 for row in rows)
    assert sum(row.fused for row in rows if row.what != "norm, add, act") == pytest.approx(fused.classes["conv"])
    possible = 1e3 * sum(
        layer.seconds(Design.FOLDED, CEILINGS.matmul, CEILINGS.copy) for layer in counted if layer.kind != "linear"
    )
    assert sum(row.possible for row in rows) == pytest.approx(possible)
    assert rows == sorted(rows, key=lambda row: -row.eager)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_librarys_own_convolutions_belong_to_their_layers(tmp_path, dtype):
    model = torchvision.models.resnet18(num_classes=3)
    work = Work("resnet18", True, 4, 64, dtype, torch.device("cpu"))
    entries = {name: ENTRIES[name] for name in (CHANNELS_LAST, FUSED)}
    steps = comparison.prepare(model, work, entries, comparison.begin(work), lambda name: None)
    traces = {name: tmp_path / f"{index}.json" for index, name in enumerate(steps)}
    eager, fused = (profiling.profile(step, work.device, steps=1, trace=traces[name]) for name, step in steps.items())
    recorded = traces[FUSED].read_text()
    assert all(f'"fusedres_native::{name}"' in recorded for name in ("conv_", "conv", "conv_dweight"))
    rows = [row for row in profiling.rows(model, work, eager, fused, CEILINGS) if row.what != "norm, add, act"]
    assert sum(row.fused for row in rows) == pytest.approx(fused.classes["conv"])


def test_the_command_shows_and_writes_the_profile(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("fusedres.bench.ceilings._COPIED_BYTES", {"cpu": 4000})
    monkeypatch.setattr("fusedres.bench.ceilings._SIDE", {"cpu": 16})
    plot, traces = tmp_path / "out.png", tmp_path / "traces"
    words = [
        "profile",
        "small_models:tiny",
        "--batch",
        "4",
        "--size",
        "16",
        "--plot",
        str(plot),
        "--trace",
        str(traces),
    ]
    monkeypatch.setattr(sys, "argv", ["fusedres", *words])
    assert cli.main() == 0
    printed = capsys.readouterr().out
    assert "conv" in printed and "of the roofline" in printed and "3x3 8 -> 16 /2" in printed
    assert plot.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert sorted(path.name for path in traces.iterdir()) == ["eager-channels_last.json", "fusedres.json"]
    events = json.loads((traces / "fusedres.json").read_text())["traceEvents"]
    assert any("convolution" in event.get("name", "") for event in events)


def test_a_model_without_blocks_is_told_so(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fusedres", "profile", "small_models:plain", "--batch", "2", "--size", "16"])
    assert cli.main() == 1
    assert "nothing in this model is fused" in capsys.readouterr().err

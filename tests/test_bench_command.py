"""python -m fusedres bench: what it shows and writes, who takes part, and what is one line of error."""

import csv
import json
import os
import sys

import pytest
import torch

from fusedres import cli, commands, machine
from fusedres.bench import comparison


@pytest.fixture
def run(monkeypatch, capsys):
    def command(*words):
        monkeypatch.setattr(sys, "argv", ["fusedres", *words])
        return cli.main(), *capsys.readouterr()

    return command


BENCH = ("bench", "small_models:tiny", "--batch", "4", "--size", "16", "--rounds", "3", "--skip", "torch.compile")


def test_the_command_shows_and_writes_the_comparison(run, tmp_path):
    files = [str(tmp_path / name) for name in ("out.json", "out.csv", "out.png")]
    status, printed, _ = run(*BENCH, "--json", files[0], "--csv", files[1], "--plot", files[2])
    assert status == 0
    assert "3 paired rounds" in printed and "malloc: " in printed and "eager channels_last" in printed
    with open(files[0]) as file:
        found = json.load(file)
    assert found["command"].startswith("python -m fusedres bench small_models:tiny --batch 4 ")
    assert found["complete"] and found["conditions"]["torch"] == torch.__version__
    with open(files[1]) as file:
        rows = list(csv.DictReader(file))
    assert [row["contestant"] for row in rows] == [result["name"] for result in found["results"]]
    assert float(rows[2]["speedup"]) == found["results"][2]["ratio"]["median"]
    with open(files[2], "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"


def test_inference_is_raced_with_installed_peers_and_tells_errors(run, tmp_path, monkeypatch):
    monkeypatch.setattr("fusedres.bench.contestants.find_spec", lambda name: None)
    rows = str(tmp_path / "out.csv")
    skip = [word for name in ("torch.compile, freezing", "oneDNN post-ops") for word in ("--skip", name)]
    status, printed, _ = run(*BENCH, "--infer", *skip, "--csv", rows)
    assert status == 0
    assert "error outputs" in printed
    for name in ("onnxruntime", "openvino"):
        assert f"{name}: not compared: {name} is not installed; pip install 'fusedres[peers]'" in printed
    with open(rows) as file:
        errors = {row["contestant"]: row["error outputs"] for row in csv.DictReader(file)}
    assert 0 < float(errors["fusedres.optimize"]) < 1e-5 and not errors["openvino"]
    _, printed, _ = run(*BENCH, "--infer", *skip, "--no-peers")
    assert "openvino" not in printed


def test_an_interrupted_command_shows_and_writes_what_there_is(run, tmp_path, monkeypatch):
    def race(steps, given, found, *, on_round, **_):
        on_round()
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison, "race", race)
    path = tmp_path / "out.json"
    status, printed, _ = run(*BENCH, "--json", str(path))
    assert status == commands.INTERRUPTED
    assert "interrupted" in printed
    assert not json.loads(path.read_text())["complete"]


def test_a_wrong_name_is_one_line(run):
    status, printed, error = run("bench", "resnet5O")
    assert (status, printed) == (1, "")
    assert error.count("\n") == 1 and "did you mean resnet50" in error


@pytest.mark.parametrize("name", ["torch.compiled", "eager", "openvino"])
def test_only_a_contestant_that_takes_part_can_be_skipped(run, name):
    status, _, error = run("bench", "small_models:tiny", "--skip", name)
    assert status == 2 and "torch.compile" in error and repr(name) in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "words, takes_part",
    [((), False), (("--peers",), True), (("--infer",), True), (("--infer", "--no-peers"), False)],
)
def test_peers_take_part_in_inference_and_where_they_are_asked_for(run, words, takes_part):
    _, _, error = run("bench", "small_models:tiny", *words, "--skip", "nobody")
    assert ("openvino" in error) == takes_part


def test_ceilings(run, monkeypatch):
    monkeypatch.setattr("fusedres.bench.ceilings._COPIED_BYTES", {"cpu": 4000})
    monkeypatch.setattr("fusedres.bench.ceilings._SIDE", {"cpu": 16})
    status, printed, _ = run("bench", "--ceilings")
    assert status == 0 and "GB/s" in printed and "fp32 matmul" in printed


def test_keeping_pages_starts_again_with_mallocs_settings(run, monkeypatch):
    class Replaced(BaseException):
        pass

    def execve(program, words, environment):
        assert words[1:] == ["-m", "fusedres", "bench", "--keep-pages"]
        assert machine.PAGES_KEPT.items() <= environment.items()
        raise Replaced

    monkeypatch.setattr(os, "execve", execve)
    with pytest.raises(Replaced):
        run("bench", "--keep-pages")
    for name, value in machine.PAGES_KEPT.items():
        monkeypatch.setenv(name, value)
    assert machine.malloc_mode() == "pages kept"

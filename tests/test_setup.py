"""What FUSEDRES_BUILD has `pip install` build ahead, with a builder that only takes notes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")

# setup.py finds this builder where it imports the package's own.
PROGRAM = """
import json, os, runpy, sys, types
package = types.ModuleType("fusedres")
package.__path__ = ["fusedres"]
sys.modules["fusedres"] = package
import fusedres.build

def build(target, into):
    if target.name in os.environ["LACKING"].split():
        raise fusedres.build.BuildError(f"no compiler for {target.name}")
    print("BUILT", json.dumps([target.name, str(into), os.environ.get("FUSEDRES_CUDA_ARCHITECTURES")]))

fusedres.build.build = build
sys.argv = ["setup.py", "-q", "build_py", "--build-lib", "lib"]
runpy.run_path("setup.py")
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkout")
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    for name in ("fusedres", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "prebuilt"))
    return folder


def install(checkout: Path, choice: str, lacking: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FUSEDRES_", "PYTHONPATH"))}
    environment = {**kept, "FUSEDRES_BUILD": choice, "LACKING": lacking, **environment}
    command = [sys.executable, "-c", PROGRAM]
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=120)


def built(done: subprocess.CompletedProcess[str]) -> list[list[str]]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line.partition(" ")[2]) for line in done.stdout.splitlines() if line.startswith("BUILT")]


PREBUILT = str(Path("lib") / "fusedres" / "prebuilt")


def test_cuda_builds_both_libraries_for_every_gpu_without_one(checkout: Path) -> None:
    assert built(install(checkout, "cuda")) == [["native", PREBUILT, "all"], ["cuda", PREBUILT, "all"]]
    chosen = install(checkout, "cuda", FUSEDRES_CUDA_ARCHITECTURES="80 90a")
    assert [architectures for *_, architectures in built(chosen)] == ["80 90a"] * 2
    assert (checkout / "lib" / "fusedres" / "csrc" / "cuda" / "forward.cu").exists(), "the sources travel too"


@pytest.mark.parametrize("choice, names", [("cpu", ["native"]), ("auto", ["native"]), ("none", [])])
def test_the_others_build_less(checkout: Path, choice: str, names: list[str]) -> None:
    assert [name for name, *_ in built(install(checkout, choice))] == names


def test_an_explicit_choice_that_can_not_be_met_ends_the_installation(checkout: Path) -> None:
    done = install(checkout, "cuda", lacking="cuda")
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == "FUSEDRES_BUILD=cuda: no compiler for cuda"
    done = install(checkout, "rocm")
    assert done.returncode == 1 and "must be one of auto, none, cpu, cuda; got 'rocm'" in done.stderr


def test_auto_installs_without_what_can_not_be_built(checkout: Path) -> None:
    done = install(checkout, "auto", lacking="native")
    assert built(done) == [] and "no compiler for native; the package installs without" in done.stderr

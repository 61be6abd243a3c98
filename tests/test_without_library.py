"""Where the compiled library can't be had: the reference backend serves, and explain says why."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from eager import assert_matches_eager, projection_pair, sample
from stub_target import compiler_script

import fusedres
from fusedres import dispatch

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the compiled library is for Linux"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="the other reasons need a compiler to be there"),
]

Fault = Callable[[Path, pytest.MonkeyPatch], None]


def no_compiler(folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("PATH", "/nonexistent")


def broken_compiler(folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("CXX", str(compiler_script(folder / "broken", "echo 'error: no' >&2; exit 3")))


def read_only_home(folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.delenv("FUSEDRES_CACHE")
    patch.setenv("HOME", "/dev/null")


def mounted_noexec(folder: Path, patch: pytest.MonkeyPatch) -> None:
    flags = os.statvfs_result((0, 0, 0, 0, 0, 0, 0, 0, os.ST_NOEXEC, 0))
    patch.setattr(os, "statvfs", lambda path: flags)


def full_disk(folder: Path, patch: pytest.MonkeyPatch) -> None:
    words = "echo 'fatal error: error writing to x.s: No space left on device' >&2; exit 1"
    patch.setenv("CXX", str(compiler_script(folder / "g++", words)))


def writable_by_others(folder: Path, patch: pytest.MonkeyPatch) -> None:
    (folder / "cache").mkdir()
    (folder / "cache").chmod(0o777)


def nothing_built_at_first_use(folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("FUSEDRES_DISABLE_JIT", "1")


def nothing_built(folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("FUSEDRES_BUILD", "none")


FAULTS: dict[str, tuple[Fault, str]] = {
    "no compiler": (no_compiler, "no C++ compiler"),
    "broken compiler": (broken_compiler, "error: no"),
    "read-only home": (read_only_home, "set FUSEDRES_CACHE"),
    "noexec": (mounted_noexec, "mounted noexec"),
    "full disk": (full_disk, "No space left on device"),
    "world-writable cache": (writable_by_others, "must be private"),
    "FUSEDRES_DISABLE_JIT": (nothing_built_at_first_use, "not built yet, and FUSEDRES_DISABLE_JIT is set"),
    "FUSEDRES_BUILD": (nothing_built, "FUSEDRES_BUILD=none turns the compiled library off"),
}


@pytest.mark.usefixtures("home")
@pytest.mark.filterwarnings("ignore:fusedres. :RuntimeWarning")
@pytest.mark.parametrize("fault", FAULTS)
def test_the_reference_serves_and_explain_says_why(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apply, reason = FAULTS[fault]
    apply(tmp_path, monkeypatch)
    dispatch.clear()
    try:
        fused, eager = projection_pair()
        explanation = fusedres.explain(fused, sample())
        assert {choice.backend for choice in explanation.choices} == {"reference"}
        assert all(reason in choice.objections["native"] for choice in explanation.choices), str(explanation)
        assert reason in str(explanation)
        assert_matches_eager(fused, eager, sample())
        with fusedres.use_backend("native"), pytest.raises(RuntimeError, match="'native' was asked for, but "):
            fused(sample())
        report = fusedres.optimize(fused.eval().float(), example=torch.rand(2, 4, 6, 6))
        assert {line.backend for line in report.convolutions} in ({"onednn"}, {"reference"})
    finally:
        dispatch.clear()

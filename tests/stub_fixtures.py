"""Fixtures of the builder's tests, which conftest hands to them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from stub_target import ANSWER, Fake, compiler_script

from fusedres import build
from fusedres.target import Source, Target


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, no library built ahead and nothing remembered; returns where the cache will be."""
    for name in ("CXX", "CPATH", "FUSEDRES_BUILD", "FUSEDRES_DISABLE_JIT", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FUSEDRES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("STUB_ROOT", str(tmp_path / "csrc"))
    monkeypatch.setattr(build, "PREBUILT", tmp_path / "prebuilt")
    monkeypatch.setattr(build, "_resolved", {})
    return tmp_path / "cache"


@pytest.fixture
def stub(home: Path, tmp_path: Path) -> Target:
    root = tmp_path / "csrc"
    root.mkdir()
    (root / "answer.cpp").write_text(ANSWER)
    return Target("stub", root, (Source("answer.cpp"),), links_torch=False)


@pytest.fixture(scope="session")
def products(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what g++ makes of the stub: answer.o and answer.so."""
    folder = tmp_path_factory.mktemp("products")
    (folder / "answer.cpp").write_text(ANSWER)
    subprocess.run(["g++", "-fPIC", "-c", "answer.cpp", "-o", "answer.o"], cwd=folder, check=True)
    subprocess.run(["g++", "-shared", "answer.o", "-o", "answer.so"], cwd=folder, check=True)
    return folder


@pytest.fixture
def fake(tmp_path: Path, products: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    slow, log = tmp_path / "slow", tmp_path / "runs"
    path = compiler_script(
        tmp_path / "fake-g++",
        f"""echo $$ >> {log}
if [ -e {slow} ]; then sleep 60; fi
case "$*" in *" -c "*) cp {products}/answer.o "$last";; *) cp {products}/answer.so "$last";; esac""",
    )
    monkeypatch.setenv("CXX", str(path))
    found = Fake(path, slow, log)
    yield found
    if log.exists():
        found.end_slow_runs()

"""The builder where it can't build: each fault is a reason, never an exception, and ends with its cause."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from stub_target import (
    ANSWER,
    Child,
    Fake,
    alive,
    ask_again,
    compiler_script,
    origin,
    refusal,
    script,
    wait_until,
)

from fusedres import build, cache, compiler, target
from fusedres.build import Library
from fusedres.target import Target

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the compiled library is for Linux"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="builds a library: needs g++"),
]


def test_no_compiler_is_a_reason_but_an_earlier_build_serves(stub: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "/nonexistent")
        assert "no C++ compiler" in refusal(build.library(stub))
    build.build(stub)
    monkeypatch.setenv("PATH", "/nonexistent")
    assert origin(ask_again(stub)) == "cached"
    (stub.root / "answer.cpp").write_text(ANSWER + "// edited\n")
    assert "no C++ compiler" in refusal(ask_again(stub))


def left_behind(home: Path) -> list[str]:
    return sorted(path.name.partition("-")[0] for path in home.iterdir())


BROKEN = {
    "exits": ("echo 'a.cpp:1: error: no' >&2; exit 3", r"\(exit code 3\): a.cpp:1: error: no"),
    "prints binary": ("head -c 100 /dev/urandom; exit 1", r"\(exit code 1\)"),
    "leaves nothing": ("exit 0", "it left no object file.*printed nothing"),
    "leaves garbage": ('echo garbage > "$last"', "it left no object file"),
    "leaves a library that does not load": (
        r'printf "\177ELF and so on" > "$last"',
        "does not load.*set CXX",
    ),
    "dies": ("kill -9 $$", "killed by SIGKILL.*memory"),
    "hangs": ("sleep 60", "did not end within 0 s on answer"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_compiler_is_a_reason(
    fault: str, stub: Target, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body, pattern = BROKEN[fault]
    monkeypatch.setenv("CXX", str(compiler_script(tmp_path / "broken", body)))
    if fault == "hangs":
        monkeypatch.setattr(compiler, "STEP_SECONDS", 0.2)
    reason = refusal(build.library(stub))
    assert re.search(pattern, reason), reason
    assert left_behind(home) == ["failed", "lock"]


def test_a_failed_build_is_told_once_and_remembered_for_ten_minutes(
    stub: Target, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    log, broken = tmp_path / "tries", tmp_path / "broken-now"
    broken.touch()
    body = f"""echo >> {log}; if [ -e {broken} ]; then echo 'error: no'; exit 1; fi; exec g++ "$@" """
    monkeypatch.setenv("CXX", str(compiler_script(tmp_path / "g++", body)))

    def tries() -> int:
        return len(log.read_text())

    assert "error: no" in refusal(build.library(stub))
    assert capfd.readouterr().err.count("error: no") == 1
    for _ in range(3):
        assert re.search("error: no.*less than 10 minutes ago, `python -m fusedres build`", refusal(ask_again(stub)))
    assert (tries(), capfd.readouterr().err) == (1, "")

    with pytest.raises(build.BuildError, match="error: no"):
        build.build(stub)
    assert tries() == 2
    (failed,) = home.glob("failed-*")
    os.utime(failed, (0, time.time() - cache.FAILURE_SECONDS - 1))
    assert "error: no" in refusal(ask_again(stub))
    assert tries() == 3

    broken.unlink()
    assert "less than 10 minutes" in refusal(ask_again(stub))
    build.build(stub)
    assert isinstance(ask_again(stub), Library)
    assert not list(home.glob("failed-*"))


@pytest.mark.parametrize(
    "body,pattern",
    [
        ("exit 1", "--version` failed (exit code 1)"),
        ("exit 0", "--version` failed (exit code 0)"),
        ("echo g++; exit 1", "--version` failed (exit code 1)"),
        ("sleep 60", "--version` did not end"),
    ],
)
def test_a_compiler_that_does_not_tell_its_version_is_a_reason(
    body: str, pattern: str, stub: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "runs"
    monkeypatch.setenv("CXX", str(script(tmp_path / "broken", f"echo $$ >> {log}\n{body}")))
    monkeypatch.setattr(compiler, "VERSION_SECONDS", 0.2)
    started = time.monotonic()
    assert pattern in refusal(build.library(stub))
    wait_until(lambda: not alive(log))
    assert time.monotonic() - started < 5


def test_a_compiler_that_is_no_program_is_a_reason(
    stub: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "g++"
    path.write_text("not a program")
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    assert "can't be run: Exec format error; set CXX" in refusal(build.library(stub))


def test_cxx_may_be_a_relative_path(stub: Target, fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CXX", f"./{fake.path.name}")
    assert isinstance(build.library(stub), Library)


@pytest.mark.parametrize("cxx,pattern", [('"g++', "must be a command line"), ("nonesuch", "nonesuch is not on PATH")])
def test_cxx_must_name_a_compiler(cxx: str, pattern: str, stub: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", cxx)
    assert pattern in refusal(build.library(stub))


def test_a_compiler_that_hangs_is_killed_with_all_that_it_started(
    stub: Target, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.slow.touch()
    monkeypatch.setattr(compiler, "STEP_SECONDS", 0.3)
    assert "did not end within" in refusal(build.library(stub))
    wait_until(lambda: not alive(fake.log))


def test_no_torch_and_one_without_the_stable_abi_are_reasons(
    stub: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_torch = replace(stub, links_torch=True)
    monkeypatch.setattr(target, "find_spec", lambda name: None)
    assert "torch is not installed here" in refusal(ask_again(needs_torch))
    (tmp_path / "version.py").write_text("__version__ = '1.0'\n")
    old = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(target, "find_spec", lambda name: old)
    assert "install torch 2.11 or later" in refusal(ask_again(needs_torch))


def test_a_read_only_home_is_a_reason(stub: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FUSEDRES_CACHE")
    monkeypatch.setenv("HOME", "/dev/null")
    assert re.fullmatch(r"/dev/null.* can't be used: Not a directory; set FUSEDRES_CACHE", refusal(build.library(stub)))

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "/home/u/.cache/fusedres")

    monkeypatch.setattr(os, "mkdir", refuse)
    assert "Read-only file system; set FUSEDRES_CACHE" in refusal(ask_again(stub))


def test_a_cache_mounted_noexec_is_a_reason_before_anything_is_compiled(
    stub: Target, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = os.statvfs_result((0, 0, 0, 0, 0, 0, 0, 0, os.ST_NOEXEC, 0))
    monkeypatch.setattr(os, "statvfs", lambda path: flags)
    assert "mounted noexec; set FUSEDRES_CACHE" in refusal(build.library(stub))
    assert fake.runs() == 0


def test_a_full_disk_is_a_reason(stub: Target, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", refuse)
        assert refusal(build.library(stub)) == "the cache can't be used: No space left on device; set FUSEDRES_CACHE"
    body = "echo 'fatal error: error writing to x.s: No space left on device' >&2; exit 1"
    monkeypatch.setenv("CXX", str(compiler_script(tmp_path / "g++", body)))
    monkeypatch.setattr(compiler, "FULL_DISK_BYTES", 1 << 62)
    assert re.search(r"No space left on device; the disk of .* is full: free space", refusal(ask_again(stub)))
    assert left_behind(home) == ["failed", "lock"]


@pytest.mark.parametrize(
    "options,pattern",
    [
        ("noexec", "mounted noexec"),
        ("ro", "Read-only file system"),
        ("size=4k", "No space left on device|is full"),
    ],
)
def test_a_real_mount_is_a_reason(
    options: str, pattern: str, stub: Target, fake: Fake, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this system lets nobody mount in a namespace of their own")
    home.mkdir(mode=0o700)
    mount = f'mount -t tmpfs -o mode=700,{options} none {home} && exec "$@"'
    kind, reason = Child.start("ask()", prefix=("unshare", "-rm", "sh", "-c", mount, "sh")).result()
    assert kind == "Unavailable"
    assert re.search(pattern, reason), reason


def test_another_system_is_a_reason() -> None:
    code = """
sys.modules["fcntl"] = None
del os.register_at_fork
for name in ("build", "cache", "compiler", "target"):
    del sys.modules[f"fusedres.{name}"]
from fusedres import build
sys.platform = "win32"
os.environ["STUB_ROOT"] = "nowhere"
ask()
try:
    build.build(stub())
except build.BuildError:
    sys.exit(0)
sys.exit(1)
"""
    kind, reason = Child.start(code).result()
    assert (kind, reason.count("win32")) == ("Unavailable", 1)


def test_importing_runs_nothing_writes_nothing_and_needs_nothing_installed(tmp_path: Path) -> None:
    code = """
import importlib
seen = []
for name in ("build", "cache", "compiler", "target"):
    del sys.modules[f"fusedres.{name}"]
def hook(event, args):
    wrote = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if wrote or event in ("subprocess.Popen", "os.mkdir", "os.fork", "os.posix_spawn"):
        seen.append((event, str(args)))
sys.dont_write_bytecode = True
sys.addaudithook(hook)
from fusedres import build
assert "torch" not in sys.modules
print(json.dumps(["seen", seen]))
"""
    assert Child.start(code).result() == ("seen", [])

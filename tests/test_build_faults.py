"""The builder where it can't build: each fault is a reason, never an exception, and ends with its cause."""

from __future__ import annotations

import errno
import fcntl
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from stub_target import (
    ANSWER,
    Child,
    Fake,
    alive,
    answer,
    ask_again,
    compiler_script,
    leftovers,
    origin,
    refusal,
    script,
    wait_until,
)

from fusedres import build, cache, compiler
from fusedres.build import Library
from fusedres.target import Target

pytest_plugins = ["stub_fixtures"]
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the compiled library is for Linux"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
]

KILL_POINTS = 20


# Machines where it can't build


def test_no_compiler_is_a_reason_but_an_earlier_build_serves(
    stub: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert "no C++ compiler" in refusal(build.library(stub))
    monkeypatch.undo()
    monkeypatch.setattr(build, "_resolved", {})
    with monkeypatch.context() as patch:
        patch.setenv("FUSEDRES_CACHE", str(stub.root / "cache"))
        build.build(stub)
        patch.setenv("PATH", "/nonexistent")
        assert origin(ask_again(stub)) == "cached"
        (stub.root / "answer.cpp").write_text(ANSWER + "// edited\n")
        assert "no C++ compiler" in refusal(ask_again(stub))


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
    assert [path.name for path in home.iterdir()] == ["lock"]


@pytest.mark.parametrize(
    "body,pattern", [("exit 1", "failed"), ("exit 0", "failed"), ("sleep 60", "did not end")]
)
def test_a_compiler_that_does_not_tell_its_version_is_a_reason(
    body: str, pattern: str, stub: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "runs"
    monkeypatch.setenv("CXX", str(script(tmp_path / "broken", f"echo $$ >> {log}\n{body}")))
    monkeypatch.setattr(compiler, "VERSION_SECONDS", 0.2)
    assert pattern in refusal(build.library(stub))
    wait_until(lambda: not alive(log))


def test_a_compiler_that_is_no_program_is_a_reason(
    stub: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "g++"
    path.write_text("not a program")
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    assert "can't be run: Exec format error; set CXX" in refusal(build.library(stub))


def test_cxx_may_be_a_relative_path(
    stub: Target, fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CXX", f"./{fake.path.name}")
    assert isinstance(build.library(stub), Library)


@pytest.mark.parametrize(
    "cxx,pattern", [('"g++', "must be a command line"), ("nonesuch", "nonesuch is not on PATH")]
)
def test_cxx_must_name_a_compiler(
    cxx: str, pattern: str, stub: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", cxx)
    assert pattern in refusal(build.library(stub))


def test_a_compiler_that_hangs_is_killed_with_all_that_it_started(
    stub: Target, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.slow.touch()
    monkeypatch.setattr(compiler, "STEP_SECONDS", 0.3)
    assert "did not end within" in refusal(build.library(stub))
    wait_until(lambda: not alive(fake.log))


def test_a_read_only_home_is_a_reason(stub: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FUSEDRES_CACHE")
    monkeypatch.setenv("HOME", "/dev/null")
    assert re.fullmatch(
        r"/dev/null.* can't be used: Not a directory; set FUSEDRES_CACHE", refusal(build.library(stub))
    )

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


def test_a_full_disk_is_a_reason(
    stub: Target, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = "echo 'fatal error: error writing to x.s: No space left on device' >&2; exit 1"
    monkeypatch.setenv("CXX", str(compiler_script(tmp_path / "g++", body)))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 30, 1 << 30, 0))
    assert re.search(
        r"No space left on device; the disk of .* is full: free space", refusal(build.library(stub))
    )
    monkeypatch.undo()

    def refuse(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setenv("FUSEDRES_CACHE", str(home))
    monkeypatch.setattr(Path, "write_text", refuse)
    assert "No space left on device; set FUSEDRES_CACHE" in refusal(ask_again(stub))
    assert [path.name for path in home.iterdir()] == ["lock"]


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


# Several at once, and killed


def test_processes_at_once_build_once(stub: Target, fake: Fake) -> None:
    body = fake.path.read_text()
    fake.path.write_text(body.replace("if [ -e", "sleep 0.2\nif [ -e"))
    children = [Child.start("ask()") for _ in range(4)]
    results = sorted(child.result() for child in children)
    assert results == [("Library", "built now")] + [("Library", "cached")] * 3
    assert fake.runs() == 2


def test_threads_at_once_build_once(stub: Target, fake: Fake) -> None:
    found: list[object] = []
    start = threading.Barrier(8)

    def ask() -> None:
        start.wait()
        found.append(build.library(stub))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(one is found[0] for one in found)
    assert isinstance(found[0], Library)
    assert fake.runs() == 2


# Counts the interpreter's audit events (open, mkdir, rename, lock, process, dlopen) and dies at a chosen one.
DIE_AT = """
import signal
seen, last = 0, int(os.environ["DIE_AT"])
def hook(event, args):
    global seen
    seen += 1
    if seen == last:
        os.kill(os.getpid(), signal.SIGKILL)
library = build.library
def watched(target):
    sys.addaudithook(hook)
    found = library(target)
    os.environ["SEEN"] = str(seen)
    return found
build.library = watched
ask()
print(json.dumps(["events", seen]))
"""


def test_killed_at_20_points_recovers_20_of_20(
    stub: Target, fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIE_AT", "0")
    _, events = Child.start(DIE_AT).result()
    assert int(events) > KILL_POINTS
    origins = []
    for point in range(KILL_POINTS):
        root = tmp_path / f"cache{point}"
        monkeypatch.setenv("FUSEDRES_CACHE", str(root))
        monkeypatch.setenv("DIE_AT", str(1 + point * (int(events) - 1) // (KILL_POINTS - 1)))
        killed = Child.start(DIE_AT)
        killed.process.communicate(timeout=20)
        assert killed.process.returncode == -signal.SIGKILL
        found = ask_again(stub)
        assert answer(found) == 42
        # What was killed between its publication and its cleaning is found, and cleaned by the next build.
        assert origin(found) == "cached" or leftovers(root) == []
        origins.append(origin(found))
    assert set(origins) == {"built now", "cached"}


def test_a_killed_build_leaves_no_lock_though_its_compiler_lives_on(
    stub: Target, fake: Fake, home: Path
) -> None:
    fake.slow.touch()
    child = Child.start("ask()")
    wait_until(fake.runs)
    child.process.kill()
    child.process.communicate()
    fake.slow.unlink()
    started = time.monotonic()
    assert build.library(stub) == Library(next(home.glob("stub-*")) / "stub.so", "built now")
    assert time.monotonic() - started < 5
    assert alive(fake.log)
    assert leftovers(home) == []


def test_a_forked_child_does_not_keep_the_lock_of_a_killed_build(stub: Target, fake: Fake) -> None:
    fake.slow.touch()
    code = """
import threading, time
threading.Thread(target=ask, daemon=True).start()
while not Path(os.environ["RUNS"]).exists():
    time.sleep(0.01)
pid = os.fork()
if pid == 0:
    time.sleep(30)
    os._exit(0)
print(pid, flush=True)
time.sleep(30)
"""
    os.environ["RUNS"] = str(fake.log)
    child = Child.start(code)
    assert child.process.stdout is not None
    forked = int(child.process.stdout.readline())
    child.process.kill()
    child.process.wait()
    fake.slow.unlink()
    try:
        started = time.monotonic()
        assert isinstance(build.library(stub), Library)
        assert time.monotonic() - started < 5
    finally:
        os.kill(forked, signal.SIGKILL)
        child.process.communicate()


def test_a_child_forked_during_a_build_can_ask_too(
    stub: Target, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.slow.touch()
    monkeypatch.setenv("RUNS", str(fake.log))
    monkeypatch.setenv("SLOW", str(fake.slow))
    code = """
import threading, time
builder = threading.Thread(target=build.library, args=(stub(),))
builder.start()
while not Path(os.environ["RUNS"]).exists():
    time.sleep(0.01)
pid = os.fork()
if pid == 0:
    os.environ["FUSEDRES_DISABLE_JIT"] = "1"
    ask()
    os._exit(0)
os.waitpid(pid, 0)
os._exit(0)
"""
    kind, reason = Child.start(code).result()
    assert kind == "Unavailable"
    assert "not built yet" in reason


def test_a_library_found_before_a_fork_serves_the_child(stub: Target) -> None:
    code = """
found = build.library(stub())
if os.fork() == 0:
    import ctypes
    assert build.library(stub()) is found
    print(json.dumps(["answer", ctypes.CDLL(str(found.path)).answer()]), flush=True)
    os._exit(0)
os.wait()
"""
    assert Child.start(code).result() == ("answer", 42)


def test_a_lock_held_for_too_long_is_a_reason(
    stub: Target, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.mkdir(mode=0o700)
    monkeypatch.setattr(cache, "LOCK_SECONDS", 0.1)
    with open(home / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process has held" in refusal(build.library(stub))


def test_an_interrupt_ends_the_compiler_and_is_not_remembered(stub: Target, fake: Fake, home: Path) -> None:
    fake.slow.touch()
    code = """
try:
    build.library(stub())
except KeyboardInterrupt:
    assert build.resolved(stub()) is None
    ask()
"""
    child = Child.start(code)
    wait_until(fake.runs)
    fake.slow.unlink()
    child.process.send_signal(signal.SIGINT)
    assert child.result() == ("Library", "built now")
    assert leftovers(home) == []
    wait_until(lambda: not alive(fake.log))


# What is said


def test_a_quick_build_says_nothing(stub: Target, fake: Fake, capfd: pytest.CaptureFixture[str]) -> None:
    build.library(stub)
    assert capfd.readouterr() == ("", "")


def test_a_slow_build_says_one_line(
    stub: Target, home: Path, fake: Fake, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "NOTICE_SECONDS", 0)
    build.library(stub)
    assert capfd.readouterr() == ("", f"fusedres: building stub, once, in {home} (1 files)\n")


def test_a_terminal_shows_the_progress(stub: Target, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()
    with open(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setattr(compiler, "NOTICE_SECONDS", 0)
        build.library(stub)
        shown = os.read(ours, 4096).decode()
    os.close(ours)
    assert shown.splitlines()[0].startswith("fusedres: building stub")
    assert "[1/2] answer" in shown
    assert "[2/2] link" in shown
    assert shown.endswith("\r\033[K")


def test_no_stderr_is_no_fault(stub: Target, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(compiler, "NOTICE_SECONDS", 0)
    assert isinstance(build.library(stub), Library)

"""The builder in several processes and threads at once, killed, forked and interrupted."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from stub_target import (
    Child,
    Fake,
    alive,
    answer,
    ask_again,
    leftovers,
    origin,
    refusal,
    wait_until,
)

from fusedres import build, cache
from fusedres.build import Library
from fusedres.target import Target

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the compiled library is for Linux"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="builds a library: needs g++"),
]

KILL_POINTS = 20


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


def test_a_killed_build_leaves_no_lock_though_its_compiler_lives_on(stub: Target, fake: Fake, home: Path) -> None:
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


def test_a_child_forked_during_a_build_can_ask_too(stub: Target, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_lock_held_for_too_long_is_a_reason(stub: Target, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    time.sleep(0.3)  # the compiler runs before subprocess.Popen has returned
    child.process.send_signal(signal.SIGINT)
    assert child.result() == ("Library", "built now")
    assert leftovers(home) == []
    wait_until(lambda: not alive(fake.log))

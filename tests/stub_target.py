"""For the builder's tests: a one-file library without torch, a compiler that only copies, bare processes."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fusedres import build, cache
from fusedres.build import Library, Unavailable
from fusedres.target import Target

ANSWER = 'extern "C" int answer() { return 42; }\n'

# A child process has the builder without the package around it, as setup.py has: no torch, a quick start.
# What a shell has started in the background ignores an interrupt, and so would its children.
PROLOGUE = f"""
import json, os, signal, sys, types
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)
package = types.ModuleType("fusedres")
package.__path__ = [{str(Path(build.__file__).parent)!r}]
sys.modules["fusedres"] = package
from fusedres import build, cache, compiler
from fusedres.target import Source, Target
build.PREBUILT = Path("/nonexistent")
def stub():
    return Target("stub", Path(os.environ["STUB_ROOT"]), (Source("answer.cpp"),), links_torch=False)
def ask():
    found = build.library(stub())
    print(json.dumps([type(found).__name__, getattr(found, "origin", "") or found.reason]), flush=True)
"""


@dataclass(frozen=True)
class Child:
    """A Python process that has the builder and nothing else installed."""

    process: subprocess.Popen[str]

    @classmethod
    def start(cls, code: str, *, prefix: tuple[str, ...] = ()) -> Child:
        argv = [*prefix, sys.executable, "-I", "-S", "-c", PROLOGUE + code]
        pipe = subprocess.PIPE
        return cls(subprocess.Popen(argv, stdout=pipe, stderr=pipe, text=True, start_new_session=True))

    def result(self) -> tuple[str, str]:
        """The class of what library() returned and its origin or reason."""
        try:
            out, err = self.process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise
        assert self.process.returncode == 0, err
        kind, detail = json.loads(out.strip().splitlines()[-1])
        return kind, detail


@dataclass(frozen=True)
class Fake:
    """A compiler that copies what the real one made; while `slow` exists, each run takes a minute."""

    path: Path
    slow: Path
    log: Path

    def runs(self) -> int:
        return len(self.log.read_text().split()) if self.log.exists() else 0

    def end_slow_runs(self) -> None:
        for pid in self.log.read_text().split():
            with suppress(ProcessLookupError):
                os.killpg(int(pid), signal.SIGKILL)


def alive(log: Path) -> bool:
    """Whether anything that a logged run started still runs."""
    groups = set(log.read_text().split())
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, group = status.read_text().rpartition(")")[2].split()[:3]
            if group in groups and state != "Z":
                return True
    return False


def script(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def compiler_script(path: Path, body: str) -> Path:
    return script(path, f'case "$*" in *--version*) echo "fake 1.0"; exit 0;; esac\nfor last; do :; done\n{body}')


def overwrite(path: Path, content: bytes) -> None:
    """Put another file in its place: truncated, a loaded library would crash the process."""
    path.unlink()
    path.write_bytes(content)


def ask_again(stub: Target) -> Library | Unavailable:
    """What the next process would be told."""
    build._resolved.clear()
    return build.library(stub)


def answer(found: Library | Unavailable) -> int:
    assert isinstance(found, Library), found
    return ctypes.CDLL(str(found.path)).answer()


def origin(found: Library | Unavailable) -> str:
    assert isinstance(found, Library), found
    return found.origin


def refusal(found: Library | Unavailable) -> str:
    assert isinstance(found, Unavailable), found
    return found.reason


def leftovers(root: Path) -> list[str]:
    return [path.name for path in root.iterdir() if path.name.startswith(cache.TEMPORARY_PREFIX)]


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)

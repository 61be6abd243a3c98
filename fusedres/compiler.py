"""The C++ compiler: which one, in which environment, and several runs at once with a time limit.

It is run with argument lists, never through a shell, with no standard input and few environment variables:
CPATH, LIBRARY_PATH and their like can't change a library behind its key's back.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

STEP_SECONDS = 600.0
VERSION_SECONDS = 20.0
NOTICE_SECONDS = 1.0
POLL_SECONDS = 0.01
FULL_DISK_BYTES = 1 << 20
# A compiler from an environment module or a conda environment needs the first two, ccache the third.
KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "HOME")


class BuildError(RuntimeError):
    """A library can't be built or loaded: one sentence, and in `output` what the compiler said."""

    def __init__(self, message: str, output: str = "") -> None:
        super().__init__(message)
        self.output = output


@dataclass(frozen=True)
class Compiler:
    argv: tuple[str, ...]
    version: str

    def __str__(self) -> str:
        return f"{shlex.join(self.argv)} ({self.version})"


@dataclass(frozen=True)
class Step:
    """One run of the compiler: a word for the progress line, what to run, and the file it has to leave."""

    label: str
    argv: tuple[str, ...]
    output: Path


def find() -> Compiler:
    """The compiler that CXX names, or else g++, or else c++."""
    argv = _chosen()
    path = shutil.which(argv[0])
    if path is None:
        raise BuildError(f"there is no C++ compiler: {argv[0]} is not on PATH; install g++ or set CXX")
    argv = (os.path.abspath(path), *argv[1:])  # it runs in another folder
    return Compiler(argv, output((*argv, "--version"))[0])


def _chosen() -> tuple[str, ...]:
    text = os.environ.get("CXX", "")
    try:
        named = tuple(shlex.split(text))
    except ValueError as error:
        raise BuildError(f"CXX must be a command line; got {text!r} ({error})") from error
    return named or next(((name,) for name in ("g++", "c++") if shutil.which(name)), ("g++",))


def output(command: tuple[str, ...]) -> list[str]:
    """The lines that a short command prints: at least one, or BuildError."""
    words = f"`{shlex.join(command)}`"
    try:
        process = _run(command, _environment(), subprocess.PIPE)
    except OSError as error:
        raise BuildError(f"{words} can't be run: {error.strerror}; set CXX") from error
    try:
        printed, _ = process.communicate(timeout=VERSION_SECONDS)
    except subprocess.TimeoutExpired as error:
        _kill(process)
        raise BuildError(f"{words} did not end within {VERSION_SECONDS:.0f} s; set CXX") from error
    lines = printed.decode(errors="replace").strip().splitlines()
    if process.returncode or not lines:
        raise BuildError(f"{words} failed ({_ending(process.returncode)}); set CXX")
    return lines


def _run(argv: tuple[str, ...], environment: dict[str, str], output: int | IO[bytes]) -> subprocess.Popen[bytes]:
    # A session of its own, so that it can be killed together with the processes that it starts.
    return subprocess.Popen(
        argv,
        cwd=environment.get("TMPDIR"),
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def _environment(folder: Path | None = None) -> dict[str, str]:
    kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    return {**kept, "LC_ALL": "C", **({"TMPDIR": str(folder)} if folder else {})}


def notice(text: str) -> None:
    """Write to stderr, where there is one."""
    with suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(text)
        sys.stderr.flush()


class Progress:
    """Nothing in the first second; then one line that says what happens, and on a terminal how far it is."""

    def __init__(self, title: str, total: int) -> None:
        self.title = title
        self.total = total
        self.begun = 0
        self.text = ""
        self.started = time.monotonic()
        self.shown = ""
        self.announced = False
        self.terminal = sys.stderr is not None and sys.stderr.isatty()

    def begin(self, label: str) -> None:
        self.begun += 1
        self.text = f"[{self.begun}/{self.total}] {label}"

    def update(self) -> None:
        if not self.announced and time.monotonic() - self.started > NOTICE_SECONDS:
            self.announced = True
            notice(f"fusedres: {self.title}\n")
        if self.announced and self.terminal and self.text != self.shown:
            self.shown = self.text
            notice(f"\r\033[K{self.text}")

    def clear(self) -> None:
        """Leave the terminal's line empty."""
        self.text = ""
        self.update()


@dataclass
class _Run:
    step: Step
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    started: float = field(default_factory=time.monotonic)

    def end(self) -> None:
        """Kill the compiler with everything it started, if it still runs."""
        if self.process.poll() is None:
            _kill(self.process)
        self.log.close()


def run_all(steps: Sequence[Step], folder: Path, progress: Progress) -> None:
    """Run the steps, as many at once as there are processors; the first failure ends the others.

    Args:
        folder: for the compiler's temporary files.
    """
    waiting = deque(steps)
    running: list[_Run] = []
    try:
        while waiting or running:
            while waiting and len(running) < len(os.sched_getaffinity(0)):
                progress.begin(waiting[0].label)
                running.append(_start(waiting.popleft(), folder))
            progress.update()
            time.sleep(POLL_SECONDS)
            for run in [run for run in running if _ended(run)]:
                running.remove(run)
                run.end()
    finally:
        for run in running:
            run.end()
        progress.clear()


def _start(step: Step, folder: Path) -> _Run:
    # In memory: on a full disk the compiler's complaint would be lost with the file that holds it.
    log = os.fdopen(os.memfd_create("fusedres"), "w+b")
    return _Run(step, _run(step.argv, _environment(folder), log), log)


def _ended(run: _Run) -> bool:
    code = run.process.poll()
    if code is None:
        if time.monotonic() - run.started < STEP_SECONDS:
            return False
        raise BuildError(f"{run.step.argv[0]} did not end within {STEP_SECONDS:.0f} s on {run.step.label}; set CXX")
    if code or not _is_elf(run.step.output):
        run.log.seek(0)
        output = run.log.read().decode(errors="replace")
        raise BuildError(_failure(run.step, code, output), output)
    return True


def _failure(step: Step, code: int, output: str) -> str:
    lines = output.strip().splitlines() or ["it printed nothing"]
    told = next((line for line in lines if "error" in line.lower()), lines[-1]).strip()
    ending = _ending(code) if code else "it left no object file"
    remedy = "set CXX to another compiler, or FUSEDRES_DISABLE_JIT=1 to stop trying"
    if shutil.disk_usage(step.output.parent).free < FULL_DISK_BYTES:
        remedy = f"the disk of {step.output.parent} is full: free space or set FUSEDRES_CACHE"
    return f"{step.argv[0]} failed on {step.label} ({ending}): {told}; {remedy}"


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
    return f"killed by {name}, as happens when memory runs out" if name == "SIGKILL" else f"killed by {name}"


def _is_elf(path: Path) -> bool:
    with suppress(OSError), open(path, "rb") as file:
        return file.read(4) == b"\x7fELF"
    return False

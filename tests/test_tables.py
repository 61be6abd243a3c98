"""Tables that several processes add to at once; who writes one may be killed, or hold its lock for too long."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from stub_target import Child, leftovers

from fusedres import cache, times
from fusedres.tables import Table

fcntl = pytest.importorskip("fcntl", reason="where files have no owners nothing is kept")

PROCESSES, ENTRIES = 4, 20

# Adds one entry after the other, as soon as all processes are there.
ADD = """
import time
from fusedres.tables import Table
table = Table("device", (("format", 1),), "times", "measure again")
folder = Path(os.environ["FUSEDRES_CACHE"]).parent
(folder / f"ready-{me}").touch()
while len(list(folder.glob("ready-*"))) < processes:
    time.sleep(0.001)
for i in range(entries):
    table.add({f"{me}-{i}": i}, dict)
print(json.dumps(["added", entries]))
"""

HOLD = """
import time
root = cache.open_private(cache.location())
with cache.locked(root, lambda: None, cache.TABLES_LOCK):
    print("held", flush=True)
    time.sleep(60)
"""

# Is killed when all is written and nothing is in its place yet.
DIE = """
from fusedres.tables import Table
os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
Table("device", (("format", 1),), "times", "measure again").add({"lost": 1}, dict)
"""


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Table:
    monkeypatch.setenv("FUSEDRES_CACHE", str(tmp_path / "cache"))
    return Table("device", (("format", 1),), "times", "measure again")


def as_they_are(entries: Mapping[str, Any]) -> Mapping[str, Any]:
    return entries


def test_processes_at_once_lose_no_entry(table: Table) -> None:
    counts = f"processes, entries = {PROCESSES}, {ENTRIES}\n"
    children = [Child.start(f"me = {me}; {counts}{ADD}") for me in range(PROCESSES)]
    assert [child.result() for child in children] == [("added", ENTRIES)] * PROCESSES
    expected = {f"{me}-{i}": i for me in range(PROCESSES) for i in range(ENTRIES)}
    assert table.load(as_they_are) == expected


def test_the_lock_of_one_that_died_holding_it_is_free(table: Table) -> None:
    table.save({"before": 1})
    child = Child.start(HOLD)
    assert child.process.stdout is not None and child.process.stdout.readline() == "held\n"
    with open(table.path.parent / cache.TABLES_LOCK) as lock, pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    child.process.kill()
    child.process.communicate()
    started = time.monotonic()
    table.add({"after": 2}, as_they_are)
    assert time.monotonic() - started < 5
    assert table.load(as_they_are) == {"before": 1, "after": 2}


def test_a_writer_that_is_killed_spoils_nothing(table: Table) -> None:
    table.save({"before": 1})
    before = sorted(path.name for path in table.path.parent.iterdir())
    child = Child.start(DIE)
    child.process.communicate(timeout=20)
    assert child.process.returncode == -signal.SIGKILL
    assert table.load(as_they_are) == {"before": 1}
    table.add({"after": 2}, as_they_are)
    assert table.load(as_they_are) == {"before": 1, "after": 2}
    assert sorted(path.name for path in table.path.parent.iterdir()) == before


def keep(table: Table) -> None:
    """As `optimize` does at its end."""
    with times.measuring():
        found = times._found.get()
        assert found is not None
        found[table] = {"entry": {"native": 1.0}}


def test_a_lock_held_for_too_long_is_a_warning(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    table.save({})
    monkeypatch.setattr(cache, "LOCK_SECONDS", 0.1)
    with open(table.path.parent / cache.TABLES_LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.warns(UserWarning, match=r"is not kept: another process has held .*tables\.lock for"):
            keep(table)
    assert table.load(as_they_are) == {}


def test_a_build_that_begins_meanwhile_removes_nothing_of_it(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def clean_first(*paths: Path) -> None:
        cache.remove_leftovers(table.path.parent)
        replace(*paths)

    monkeypatch.setattr(os, "replace", clean_first)
    table.add({"entry": 1}, as_they_are)
    assert table.load(as_they_are) == {"entry": 1} and not leftovers(table.path.parent)


def test_a_build_does_not_keep_it_waiting(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "LOCK_SECONDS", 0.1)
    root = cache.open_private(table.path.parent)
    with cache.locked(root, lambda: None):
        table.add({"entry": 1}, as_they_are)
    assert table.load(as_they_are) == {"entry": 1}


def test_where_files_have_no_owners_nothing_is_kept(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "geteuid")
    with pytest.raises(cache.Refused, match=r"the cache must be private, and on .* there is no telling whose"):
        table.save({})
    assert not table.path.parent.exists()

"""Measured times, by which a computation's way is chosen: milliseconds by candidate, under an entry of a table.

Times are taken inside `measuring` only, and kept in the user's cache for other processes. A rule names the first of the
candidates, which stays unless another is clearly faster. FUSEDRES_TUNE=0, deterministic algorithms and a forced backend
leave it to the rule alone.
"""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusedres import build
from fusedres.cache import Refused
from fusedres.host import cpu_name
from fusedres.native_sources import NATIVE
from fusedres.tables import Table, Unusable

Times = Mapping[str, float]  # milliseconds by candidate
Calls = Mapping[str, Callable[[], object]]  # what is timed, by candidate

_FORMAT = 1
_GAIN = 0.9  # what share of the first one's time another may take at most to come before it
_ROUNDS = 7  # at least
_AGREEMENT = 1.1  # within which the three least times of a candidate must lie
_CACHE_BYTES = 1 << 27  # more than a core's share of any cache
_SECONDS = 1.0  # after which what does not settle is left to the rule,
_PATIENCE = 3  # but not before this many times as many rounds as are needed

is_backend_forced = False  # `dispatch.force` sets it
_found: ContextVar[dict[Table, dict[str, Times]] | None] = ContextVar("found", default=None)
_read: dict[Path, dict[str, Times]] = {}  # what a file held when it was first asked for, and what was measured since


@contextmanager
def measuring() -> Iterator[None]:
    """Have times taken inside; they are kept at the end."""
    found: dict[Table, dict[str, Times]] = {}
    token = _found.set(found)
    try:
        yield
    finally:
        _found.reset(token)
        for table, entries in found.items():
            try:
                table.add(entries, positive)
            except (OSError, Refused) as error:
                warnings.warn(f"what was measured of convolutions is not kept: {error}", stacklevel=2)


def is_measuring() -> bool:
    return _found.get() is not None


def threads() -> int:
    """How many threads times have to be for; 0 where the rule is to choose. Every call of a kernel may ask."""
    return 0 if is_backend_forced or torch.are_deterministic_algorithms_enabled() else torch.get_num_threads()


def are_used() -> bool:
    """Whether times may choose."""
    chosen = os.environ.get("FUSEDRES_TUNE") or "1"
    if chosen not in ("0", "1"):
        raise ValueError(f"FUSEDRES_TUNE must be 0 or 1; got {chosen!r}")
    return chosen == "1" and threads() > 0


def where(device: str) -> str:
    """The beginning of an entry; an instruction set that was asked for, and the threads, count as sizes do."""
    isa = os.environ.get("FUSEDRES_CPU_ISA") or "best"
    return f"{torch.get_num_threads()} threads/{isa}" if device == "cpu" else "cuda"


def known(device: str, entry: str) -> Times:
    """The times of an entry; none where nothing was measured."""
    return _known(table_of(device)).get(entry, {})


def digest(device: str) -> str:
    """Of all times that are known: another one where other choices may be."""
    return sha256(json.dumps(_known(table_of(device)), sort_keys=True).encode()).hexdigest()[:16]


def take(device: str, entry: str, calls: Calls, warm: Sequence[Tensor]) -> Times:
    """The times of an entry, measured now, inside `measuring`; none, and nothing is kept, where they don't settle.

    Args:
        warm: what lies in the caches when a call begins, if it fits.
    """
    found, table = _found.get(), table_of(device)
    assert found is not None, "outside measuring()"
    times = measure(calls, warm)
    if times:
        _known(table)[entry] = found.setdefault(table, {})[entry] = times
    return times


def fastest(names: Sequence[str], times: Times) -> str | None:
    """The candidate that the times name, the rule's being the first; None where one of them was not measured."""
    if not set(names) <= times.keys():
        return None
    best = min(names, key=times.__getitem__)
    return best if times[best] < _GAIN * times[names[0]] else names[0]


def words(chosen: str, times: Times) -> str:
    """The times as a sentence, the chosen one's first."""
    names = sorted(times, key=lambda name: (name != chosen, times[name]))
    return ", ".join(f"{name} {times[name]:.3g} ms" for name in names)


def measure(calls: Calls, warm: Sequence[Tensor]) -> Times:
    """The third least time of each, as in a network: `warm` in the caches, what else there is not.

    What else the machine does makes none of them faster; where it does so much that the least times differ, nothing.
    """
    device = warm[0].device
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    others = torch.zeros(_CACHE_BYTES // 4, device=device)
    samples: dict[str, list[float]] = {name: [] for name in calls}

    def run_all() -> None:
        for name, call in calls.items():
            for t in (others, *warm):
                t.sum()
            wait()
            start = time.perf_counter()
            call()
            wait()
            samples[name].append(1e3 * (time.perf_counter() - start))

    begun = time.perf_counter()
    run_all()
    first = time.perf_counter()
    end = first + max(_SECONDS, _PATIENCE * _ROUNDS * (first - begun))
    for taken in samples.values():
        taken.clear()
    while not all(map(_is_settled, samples.values())):
        if time.perf_counter() > end:
            return {}
        run_all()
    return {name: sorted(taken)[2] for name, taken in samples.items()}


def _is_settled(taken: list[float]) -> bool:
    return len(taken) >= _ROUNDS and sorted(taken)[2] <= min(taken) * _AGREEMENT


def table_of(device: str) -> Table:
    """The file of a device's times, as this library measures them."""
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    library = build.library(NATIVE) if device == "cpu" else None
    kernels = library.path.parent.name if isinstance(library, build.Library) else "none"
    header = {"format": _FORMAT, "device": name, "torch": torch.__version__, "kernels": kernels}
    remedy = "optimize and tune measure them again"
    return Table(f"convolutions {name}", tuple(header.items()), "times of convolutions", remedy)


def _known(table: Table) -> dict[str, Times]:
    found = _read.get(table.path)
    if found is None:
        found = _read[table.path] = dict(table.load(positive))
    return found


def positive(entries: Mapping[str, Any]) -> Mapping[str, Times]:
    """A table's entries, if they are times."""
    for entry, times in entries.items():
        if not all(isinstance(ms, float) and 0 < ms < math.inf for ms in times.values()):
            raise Unusable(f"{entry} has a time that is none")
    return entries

"""Tables of what was measured on a device, kept in the user's cache: one JSON file each, replaced whole under a lock.

A table is used only as it was written: under the header that its reader expects, with entries that its reader accepts,
and undamaged. Any other is ignored, with one warning.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusedres import cache
from fusedres.compiler import Progress


class Unusable(Exception):  # noqa: N818  it is a verdict
    """Why a table is not used."""


@dataclass(frozen=True)
class Table:
    """One file of the cache.

    Args:
        device: what it was measured on; the file bears the name.
        header: what holds for every entry, such as versions.
        what, remedy: words for the warning.
    """

    device: str
    header: tuple[tuple[str, object], ...]
    what: str
    remedy: str

    @property
    def path(self) -> Path:
        return cache.table(cache.location(), self.device)

    def load(self, accept: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> Mapping[str, Any]:
        """The entries as `accept` returns them, which raises where they are wrong; none where there is no such file."""
        try:
            return accept(self._entries(self.path.read_bytes()))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except Exception as error:
            reason = error if isinstance(error, Unusable) else f"it can't be read ({type(error).__name__})"
            warnings.warn(f"the {self.what} in {self.path} are ignored, because {reason}; {self.remedy}", stacklevel=3)
            return {}

    def save(self, entries: Mapping[str, object]) -> Path:
        """Replace the file."""
        with self._locked():
            return self._replace(entries)

    def add(self, entries: Mapping[str, object], accept: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> Path:
        """Put entries beside those that the file has by now, of other processes, if it can be used at all."""
        present: Mapping[str, object] = {}
        with self._locked():
            with suppress(Exception):  # whoever reads it is warned
                found = self._entries(self.path.read_bytes())
                accept(found)
                present = found
            return self._replace({**present, **entries})

    @contextmanager
    def _locked(self) -> Iterator[None]:
        waiting = Progress(f"waiting for another process, which writes {self.path}", 0)
        with cache.locked(cache.open_private(self.path.parent), waiting.update, cache.TABLES_LOCK):
            yield

    def _replace(self, entries: Mapping[str, object]) -> Path:
        path = self.path
        body = {"header": dict(self.header), "entries": dict(entries)}
        written = path.with_suffix(".new")  # a name that never changes: what the killed leave is written over
        written.write_text(json.dumps({**body, "sha256": _digest(body)}, indent=1, sort_keys=True) + "\n")
        os.replace(written, path)
        return path

    def _entries(self, text: bytes) -> Mapping[str, Any]:
        data = json.loads(text)
        if data.keys() != {"header", "entries", "sha256"}:
            raise Unusable("it is no table")
        body = {"header": data["header"], "entries": data["entries"]}
        if data["sha256"] != _digest(body):
            raise Unusable("it is damaged: its digest differs from its contents'")
        for name, expected in self.header:
            if body["header"].get(name) != expected:
                raise Unusable(f"its {name} is {body['header'].get(name)!r} and not {expected!r}")
        return body["entries"]


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()

"""The commands that need nothing but torch; each returns the process's exit status."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from enum import Enum

import torch

from fusedres import build as building
from fusedres import doctor as diagnosis
from fusedres import machine
from fusedres.native_sources import CUDA, NATIVE

INTERRUPTED = 130


def info(*, as_json: bool) -> int:
    found = machine.facts()
    print(json.dumps(found, indent=1) if as_json else machine.text(found))  # noqa: T201
    return 0


def doctor() -> int:
    failed = False
    for finding in diagnosis.examine():
        print(finding, flush=True)  # noqa: T201
        failed |= finding.status == diagnosis.FAILED
    return int(failed)


class LibraryName(Enum):
    CPU = "cpu"
    CUDA = "cuda"


def build(libraries: Sequence[str]) -> int:
    """Those named, or what this torch can use."""
    chosen = libraries or (("cpu", "cuda") if torch.version.cuda else ("cpu",))
    try:
        for name in chosen:
            print(building.build({"cpu": NATIVE, "cuda": CUDA}[name]))  # noqa: T201
    except building.BuildError as error:
        return fail(str(error))
    return 0


def explain(error: Exception) -> str:
    """What went wrong, and what to do next: an error of fusedres's own says that itself."""
    if type(error).__module__.startswith("fusedres"):
        return str(error)
    return f"{type(error).__name__}: {error}; --debug before the command shows where"


def fail(message: str, status: int = 1) -> int:
    print(f"fusedres: {message}", file=sys.stderr)  # noqa: T201
    return status

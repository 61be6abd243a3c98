"""The table of configurations that tuning found, kept in the user's cache: one file a device.

A table is used only as it was written: for this device, by this version of Triton, out of the configurations that are
declared now, and undamaged. Any other is ignored, with one warning. It can choose among declared configurations only,
all of which compute the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
import triton

from fusedres import cache
from fusedres.backends.triton.configurations import PASSES, Config, Pass
from fusedres.backends.triton.view import View

_FORMAT = 1
_read: dict[str, Mapping[str, Config]] = {}  # by device: what its file held when it was first asked for


def key(kind: Pass, view: View, dtype: torch.dtype) -> str:
    """What a tuned configuration is for: the pass, dtype and order, the channels, the pixels to a power of 2."""
    order = "channels_last" if view.channels_last else "contiguous"
    magnitude = (view.images * view.pixels).bit_length()
    return f"{kind.name}/{str(dtype).removeprefix('torch.')}/{order}/{view.channels}/{magnitude}"


def find(device: str, entry: str) -> Config | None:
    """The tuned configuration under that key, if there is one."""
    table = _read.get(device)
    if table is None:
        table = _read[device] = load(device)
    return table.get(entry)


def path_of(device: str) -> Path:
    return cache.table(cache.location(), device)


def load(device: str) -> Mapping[str, Config]:
    """The device's table; an empty one, with a warning, where the file is not to be used."""
    path = path_of(device)
    try:
        return _parse(path.read_bytes(), device)
    except FileNotFoundError:
        return {}
    except Exception as error:
        reason = error if isinstance(error, _Unusable) else f"it can't be read ({type(error).__name__})"
        warnings.warn(
            f"the tuned configurations in {path} are ignored, because {reason}; "
            "remove the file, or tune again with fusedres.tuning.tune()",
            stacklevel=2,
        )
        return {}


def save(device: str, found: Mapping[str, Config]) -> Path:
    """Add to the device's table; the file is replaced whole, and used from now on."""
    table = {**load(device), **found}
    body = {"header": _header(device), "entries": {entry: astuple(config) for entry, config in table.items()}}
    path = path_of(device)
    with cache.temporary(cache.open_private(path.parent)) as folder:
        written = folder / path.name
        written.write_text(json.dumps({**body, "sha256": _digest(body)}, indent=1, sort_keys=True) + "\n")
        os.replace(written, path)
    _read[device] = table
    return path


class _Unusable(Exception):  # noqa: N818  it is a verdict
    """Why a table is not used."""


def _parse(text: bytes, device: str) -> Mapping[str, Config]:
    data = json.loads(text)
    if data.keys() != {"header", "entries", "sha256"}:
        raise _Unusable("it is no table")
    body = {"header": data["header"], "entries": data["entries"]}
    if data["sha256"] != _digest(body):
        raise _Unusable("it is damaged: its digest differs from its contents'")
    for name, expected in _header(device).items():
        if body["header"].get(name) != expected:
            raise _Unusable(f"its {name} is {body['header'].get(name)!r} and not {expected!r}")
    declared = {kind.name: kind.configs for kind in PASSES}
    table = {entry: Config(*values) for entry, values in body["entries"].items()}
    for entry, config in table.items():
        if config not in declared[entry.partition("/")[0]]:
            raise _Unusable(f"{entry} has a configuration that is not declared")
    return table


def _header(device: str) -> dict[str, Any]:
    return {"format": _FORMAT, "device": device, "triton": triton.__version__}


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()

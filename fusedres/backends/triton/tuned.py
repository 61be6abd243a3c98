"""The table of configurations that tuning found, one file a device.

It is for this device, this version of Triton, and out of the configurations that are declared now. It can choose among
declared configurations only, all of which compute the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
import triton

from fusedres.backends.triton.blocking import PRODUCTS, Blocks
from fusedres.backends.triton.configurations import PASSES, Config, Pass
from fusedres.backends.triton.view import View
from fusedres.tables import Table, Unusable

Configs = Mapping[str, Config | Blocks]  # by what they are for

_FORMAT = 1
_read: dict[str, Configs] = {}  # by device: what its file held when it was first asked for


def key(kind: Pass, view: View, dtype: torch.dtype) -> str:
    """What a tuned configuration is for: the pass, dtype and order, the channels, the pixels to a power of 2."""
    order = "channels_last" if view.channels_last else "contiguous"
    magnitude = (view.images * view.pixels).bit_length()
    return f"{kind.name}/{str(dtype).removeprefix('torch.')}/{order}/{view.channels}/{magnitude}"


def find(device: str, entry: str) -> Config | Blocks | None:
    """The tuned configuration under that key, if there is one."""
    table = _read.get(device)
    if table is None:
        table = _read[device] = load(device)
    return table.get(entry)


def path_of(device: str) -> Path:
    return _table(device).path


def load(device: str) -> Configs:
    """The device's table; an empty one, with a warning, where the file is not to be used."""
    return _table(device).load(_declared)


def save(device: str, found: Configs) -> Path:
    """Add to the device's table, which is used from now on."""
    table = {**load(device), **found}
    path = _table(device).add({entry: astuple(config) for entry, config in found.items()}, _declared)
    _read[device] = table
    return path


def _table(device: str) -> Table:
    header = ("format", _FORMAT), ("device", device), ("triton", triton.__version__)
    return Table(device, header, "tuned configurations", "remove the file, or tune again with python -m fusedres tune")


def _declared(entries: Mapping[str, Any]) -> Configs:
    """The declared configurations that a table names; what is read only equals them: 1024.0 would do."""
    declared = {kind.name: {astuple(config): config for config in kind.configs} for kind in (*PASSES, *PRODUCTS)}
    table = {}
    for entry, values in entries.items():
        config = declared[entry.partition("/")[0]].get(tuple(values))
        if config is None:
            raise Unusable(f"{entry} has a configuration that is not declared")
        table[entry] = config
    return table

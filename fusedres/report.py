"""What fuse did, block by block: the rows, their reasons, and the table they print as."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from enum import Enum


class Code(str, Enum):
    """Why a block was left as it is."""

    UNSUPPORTED = "unsupported"
    UNPROVEN = "unproven"
    NORM = "norm"
    STRUCTURE = "structure"
    HOOKS = "hooks"
    PATCHED = "patched"
    PARAMETRIZED = "parametrized"
    SHARED = "shared"
    QUANTIZED = "quantized"
    SHARDED = "sharded"
    SCRIPTED = "scripted"
    META = "meta"
    CLASS = "class"


@dataclass(frozen=True)
class Objection:
    """Why a module can't be fused: a code to test for, and the sentence that says it."""

    code: Code
    reason: str


@dataclass(frozen=True)
class Row:
    """What became of one block.

    Args:
        path: of the block in the model.
        family: what it was recognised as.
        status: "fused", "already fused" or "skipped".
        fused: what runs as one operation, such as "bn2+add+relu", in order; empty where skipped.
        plain: children in the block that run as they are beside the convolutions.
        code: of the objection, where skipped.
        reason: the objection's sentence, where skipped.
    """

    path: str
    family: str
    status: str
    fused: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    code: Code | None = None
    reason: str | None = None

    @property
    def what(self) -> str:
        """What the table says of the block."""
        if self.reason is not None and self.code is not None:
            return f"{self.code.value}: {self.reason}"
        return ", ".join(self.fused) + (f"; as it is: {', '.join(self.plain)}" if self.plain else "")


@dataclass(frozen=True)
class Report:
    """The blocks of a model in order; printing it gives a table."""

    rows: tuple[Row, ...]

    @property
    def fused(self) -> tuple[Row, ...]:
        """The blocks that this call fused."""
        return self._of("fused")

    @property
    def already_fused(self) -> tuple[Row, ...]:
        """The blocks that were fused before."""
        return self._of("already fused")

    @property
    def skipped(self) -> tuple[Row, ...]:
        """The blocks left as they are, each with its reason."""
        return self._of("skipped")

    def _of(self, status: str) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.status == status)

    def to_json(self) -> str:
        """The rows as a JSON list of objects."""
        return json.dumps([asdict(row) for row in self.rows], indent=2)

    def __str__(self) -> str:
        if not self.rows:
            return "no residual block found"
        cells = [("block", "family", "status", "what")]
        cells += [(row.path or "(model)", row.family, row.status, row.what) for row in self.rows]
        widths = [max(len(line[column]) for line in cells) for column in range(3)]
        lines = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[3]]).rstrip()
            for line in cells
        ]
        return "\n".join([*lines, self._totals()])

    def _totals(self) -> str:
        counts = [(len(self._of(status)), status) for status in ("fused", "already fused", "skipped")]
        return ", ".join(f"{count} {status}" for count, status in counts if count)

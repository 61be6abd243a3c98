"""Comparisons and profiles as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from rich import box
from rich.table import Table

from fusedres.bench.comparison import Comparison, Result

_MALLOC = {
    "default": "malloc: default (glibc maps a tensor above 32 MiB anew at every allocation: page faults, not "
    "arithmetic; --keep-pages compares without them)",
    "pages kept": "malloc: pages kept (MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_ and MALLOC_TOP_PAD_ are set)",
}


def comparison(found: Comparison) -> Table:
    table = Table(
        title=found.work, title_justify="left", caption=caption(found), caption_justify="left", box=box.SIMPLE_HEAD
    )
    table.add_column("contestant", no_wrap=True)
    quantities = list(dict.fromkeys(quantity for result in found.results for quantity in result.errors))
    headings = ["ms", "images/s", "eager / this [95 %]", "peak MiB", *(f"error {q}" for q in quantities)]
    for heading in headings:
        table.add_column(heading, justify="right")
    for result in found.results:
        table.add_row(result.name, *_cells(result, quantities))
    return table


def _cells(result: Result, quantities: list[str]) -> Iterator[str]:
    yield f"{median(result.samples_ms):.2f}" if result.samples_ms else "-"
    yield f"{result.images_per_second:.1f}" if result.images_per_second else "-"
    ratio = result.ratio
    yield f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]" if ratio else "-"
    yield f"{result.peak_bytes / 2**20:.0f}" if result.peak_bytes else "-"
    for quantity in quantities:
        yield f"{result.errors[quantity]:.1e}" if quantity in result.errors else "-"


def caption(found: Comparison) -> str:
    """Rounds, conditions, and who is absent and why."""
    rounds = max((len(result.samples_ms) for result in found.results), default=0)
    conditions = ", ".join(
        f"{name} {value}" for name, value in found.conditions.items() if value is not None and name != "malloc"
    )
    lines = [f"{rounds} paired rounds{'' if found.complete else ', interrupted'}; {conditions}"]
    lines.append(_MALLOC[str(found.conditions["malloc"])])
    lines += [f"{result.name}: not compared: {result.absent}" for result in found.results if result.absent]
    return "\n".join(lines)

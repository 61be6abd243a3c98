"""Comparisons and profiles as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median

from rich import box
from rich.table import Table

from fusedres.bench.ceilings import Ceilings
from fusedres.bench.comparison import Comparison, Result
from fusedres.bench.kernels import Kernel
from fusedres.bench.profiling import Profile, Row
from fusedres.bench.roofline import Design

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
    counted = f"{rounds} paired rounds{'' if found.complete else ', interrupted'}"
    absent = [f"{result.name}: not compared: {result.absent}" for result in found.results if result.absent]
    peak = "peak: the most that torch's allocator held during a step, beyond what it held before"
    return "\n".join([f"{counted}; {conditions(found.conditions)}", peak, *absent])


def conditions(facts: Mapping[str, object]) -> str:
    """The conditions in a line, and the malloc mode, with what it means, in another."""
    words = [f"{name} {value}" for name, value in facts.items() if value is not None and name != "malloc"]
    return f"{', '.join(words)}\n{_MALLOC[str(facts['malloc'])]}"


def classes(title: str, eager: Profile, fused: Profile) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("class", "eager ms", "share", "fused ms", "share"):
        table.add_column(heading, justify="left" if heading == "class" else "right")
    totals = [sum(profile.classes.values()) for profile in (eager, fused)]
    names = sorted({*eager.classes, *fused.classes}, key=lambda name: -eager.classes.get(name, 0.0))
    for name in names:
        cells = [profile.classes.get(name, 0.0) for profile in (eager, fused)]
        parts = [f"{cell / total:.0%}" for cell, total in zip(cells, totals, strict=True)]
        table.add_row(name, f"{cells[0]:.2f}", parts[0], f"{cells[1]:.2f}", parts[1])
    table.add_section()
    table.add_row("all", f"{totals[0]:.2f}", "", f"{totals[1]:.2f}", "")
    return table


def kernels(
    title: str, counted: Mapping[str, Mapping[str, Kernel]], roofline: Mapping[Design, int], images: int
) -> Table:
    """What eager and fused call and move, and what the designs would."""
    caption = (
        "bytes: every operand once a pass, as the roofline counts, wherever a cache holds it; the roofline has norms, "
        "activations, additions, convolutions and linear layers"
    )
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("operator", "eager calls", "MB an image", "fused calls", "MB an image"):
        table.add_column(heading, justify="left" if heading == "operator" else "right")
    for name in {name: None for of_model in counted.values() for name in of_model}:
        found = [of_model.get(name, Kernel()) for of_model in counted.values()]
        if any(kernel.bytes >= _LISTED_BYTES * images for kernel in found):
            table.add_row(name, *(cell for k in found for cell in (str(k.calls), f"{k.bytes / 1e6 / images:.1f}")))
    table.add_section()
    sums = [(sum(k.calls for k in found.values()), sum(k.bytes for k in found.values())) for found in counted.values()]
    table.add_row("all", *(cell for calls, moved in sums for cell in (str(calls), f"{moved / 1e6 / images:.1f}")))
    for design, moved in roofline.items():
        cells = ["", f"{moved / 1e6 / images:.1f}"]
        table.add_row(f"roofline, {design.value}", *(cells if design is Design.EAGER else ["", "", *cells]))
    return table


_LISTED_BYTES = 50_000


def layers(rows: Sequence[Row], ceilings: Ceilings) -> Table:
    caption = (
        f"possible: every operand moved once at {ceilings.copy / 1e9:.1f} GB/s (a copy), every FLOP at "
        f"{ceilings.matmul / 1e9:.0f} GFLOP/s (a matrix product), each direction bound by the slower one; tensors that "
        "stay in a cache can beat it"
    )
    table = Table(caption=caption, caption_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("layer", "output", "count", "eager ms", "fused ms", "possible ms", "of the roofline"):
        table.add_column(heading, justify="left" if heading in ("layer", "output") else "right")
    for row in rows:
        times = (f"{row.eager:.2f}", f"{row.fused:.2f}", f"{row.possible:.2f}", f"{row.share:.0%}")
        table.add_row(row.what, "x".join(map(str, row.shape)), str(row.count), *times)
    return table

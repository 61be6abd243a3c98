"""Charts as PNG files, as wide as a README shows them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fusedres.bench.comparison import Comparison
from fusedres.bench.contestants import FUSED
from fusedres.bench.profiling import Row
from fusedres.bench.timing import Ratio

WIDTH_INCHES, DPI = 9.0, 120
AXES_POINTS, LINE_POINTS = 225, 15  # how high the axes of a trade-off are, about, and a name
ROWS_SHOWN = 12
OURS, THEIRS = "#c4442b", "#8795a1"
CLASS_COLOURS = {
    "conv": "#5b7c99",
    "bn": "#d9a441",
    "add": "#7fa65a",
    "relu": "#a77bb5",
    "fused": OURS,
    "other": "#c9cfd4",
}
_STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "white",
}


def comparison(found: Comparison, path: Path) -> None:
    """How many times as fast as eager each contestant is, with its interval."""
    timed = [result for result in found.results if result.ratio is not None]
    ratios = {result.name: result.ratio for result in timed if result.ratio is not None}
    speedups(ratios, path, title=found.work, caption=caption(found))


def speedups(
    ratios: Mapping[str, Ratio],
    path: Path,
    *,
    title: str,
    caption: str,
    ours: Collection[str] = (FUSED,),
    facts: Mapping[str, str] | None = None,
) -> None:
    """A bar and an interval for each name.

    Args:
        ours: the names of the bars that stand out.
        facts: written into the file, beside the picture.
    """
    with pyplot.rc_context(_STYLE):
        figure, axes = pyplot.subplots(figsize=(WIDTH_INCHES, 1.6 + 0.42 * len(ratios)), layout="constrained")
        names = [fill(name, 44) for name in ratios]
        values = [ratio.median for ratio in ratios.values()]
        below = [ratio.median - ratio.low for ratio in ratios.values()]
        above = [ratio.high - ratio.median for ratio in ratios.values()]
        colours = [OURS if name in ours else THEIRS for name in ratios]
        axes.barh(names, values, color=colours, xerr=[below, above], error_kw={"capsize": 3, "ecolor": "#333333"})
        for row, ratio in enumerate(ratios.values()):
            place = {"xytext": (7, 0), "textcoords": "offset points", "va": "center"}
            over_the_line = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"}
            axes.annotate(f"{ratio.median:.2f}x", (ratio.high, row), bbox=over_the_line, **place)
        axes.invert_yaxis()
        axes.axvline(1.0, color="#333333", linewidth=1, linestyle=":")
        axes.set_xlim(0, 1.15 * max(ratio.high for ratio in ratios.values()))
        axes.set_xlabel("times as fast as eager, median of paired rounds and its 95 % interval")
        _finish(figure, path, title, caption, facts)


def tradeoff(
    points: Mapping[str, tuple[float, float]], path: Path, *, title: str, caption: str, facts: Mapping[str, str]
) -> None:
    """Peak megabytes against milliseconds, a point for each name; nearer to the corner is better."""
    with pyplot.rc_context(_STYLE):
        figure, axes = pyplot.subplots(figsize=(WIDTH_INCHES, 4.4), layout="constrained")
        most = 1.15 * max(megabytes for _, megabytes in points.values())
        taken = {OURS: 0.0, THEIRS: 0.0}  # below it are names, in typographic points
        for name, point in sorted(points.items(), key=lambda item: item[1][1]):
            colour, side, beside = (OURS, "right", -9) if name.startswith(FUSED) else (THEIRS, "left", 9)
            height = point[1] / most * AXES_POINTS
            at = max(height - 4, taken[colour])
            taken[colour] = at + LINE_POINTS
            axes.scatter(*point, s=70, color=colour)
            axes.annotate(name, point, (beside, at - height), textcoords="offset points", color=colour, ha=side)
        axes.set_xlim(0, 1.2 * max(milliseconds for milliseconds, _ in points.values()))
        axes.set_ylim(0, most)
        axes.set_xlabel("milliseconds a step, median")
        axes.set_ylabel("peak MB of a step")
        _finish(figure, path, title, caption, facts)


def profile(
    before: Mapping[str, float],
    after: Mapping[str, float],
    rows: Sequence[Row],
    path: Path,
    *,
    title: str,
    caption: str,
) -> None:
    """Where a step's milliseconds go by class, and the longest layers beside what the ceilings allow."""
    with pyplot.rc_context(_STYLE):
        rows = rows[:ROWS_SHOWN]
        heights = [2.2, 0.42 * len(rows) + 1.0]
        figure, (above, below) = pyplot.subplots(
            2, figsize=(WIDTH_INCHES, sum(heights) + 0.6), height_ratios=heights, layout="constrained"
        )
        _stack(above, before, after)
        _beside(below, rows)
        _finish(figure, path, title, caption)


def _stack(axes: Axes, before: Mapping[str, float], after: Mapping[str, float]) -> None:
    starts = [0.0, 0.0]
    least = 0.04 * max(sum(before.values()), sum(after.values()))
    for name, colour in CLASS_COLOURS.items():
        widths = [before.get(name, 0.0), after.get(name, 0.0)]
        axes.barh(["eager", "fused"], widths, left=starts, color=colour, label=name)
        for row, (start, width) in enumerate(zip(starts, widths, strict=True)):
            if width > least:
                ink = "#333333" if name == "other" else "white"
                axes.text(start + width / 2, row, f"{width:.0f}", ha="center", va="center", color=ink)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds a step, by class")
    axes.legend(ncols=len(CLASS_COLOURS), loc="lower left", bbox_to_anchor=(0, 1), frameon=False)


def _beside(axes: Axes, rows: Sequence[Row]) -> None:
    positions = range(len(rows))
    series = (
        ("eager", [row.eager for row in rows], THEIRS, -0.27),
        ("fused", [row.fused for row in rows], OURS, 0.0),
        ("possible at the ceilings", [row.possible for row in rows], "#333333", 0.27),
    )
    for name, values, colour, offset in series:
        axes.barh([position + offset for position in positions], values, height=0.25, color=colour, label=name)
    labels = [f"{row.what}\n{'x'.join(map(str, row.shape))}, {row.count} of them" for row in rows]
    axes.set_yticks(list(positions), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds a step, forward and backward, longest layers")
    axes.legend(loc="lower right", frameon=False)


def caption(found: Comparison) -> str:
    """The conditions and the command, for below a chart."""
    words = ", ".join(f"{name} {value}" for name, value in found.conditions.items() if value is not None)
    return f"{words}; {found.command}"


def _finish(figure: Figure, path: Path, title: str, caption: str, facts: Mapping[str, str] | None = None) -> None:
    figure.suptitle(fill(title, 90, break_on_hyphens=False), x=0.01, ha="left", fontsize=12)
    figure.supxlabel(fill(caption, 130, break_on_hyphens=False), x=0.01, ha="left", fontsize=8, color="#555555")
    figure.savefig(path, dpi=DPI, metadata=dict(facts or {}))
    pyplot.close(figure)

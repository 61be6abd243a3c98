"""Charts as PNG files, as wide as a README shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes

from fusedres.bench.comparison import Comparison
from fusedres.bench.contestants import FUSED
from fusedres.bench.timing import Ratio

WIDTH_INCHES, DPI = 9.0, 120
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
    speedups(ratios, path, title=found.work, caption=conditions(found.conditions))


def speedups(ratios: Mapping[str, Ratio], path: Path, *, title: str, caption: str) -> None:
    """A bar and an interval for each name."""
    with pyplot.rc_context(_STYLE):
        figure, axes = pyplot.subplots(figsize=(WIDTH_INCHES, 1.6 + 0.42 * len(ratios)))
        names = list(ratios)
        values = [ratio.median for ratio in ratios.values()]
        below = [ratio.median - ratio.low for ratio in ratios.values()]
        above = [ratio.high - ratio.median for ratio in ratios.values()]
        colours = [OURS if FUSED in name else THEIRS for name in names]
        axes.barh(names, values, color=colours, xerr=[below, above], error_kw={"capsize": 3, "ecolor": "#333333"})
        for position, (ratio, value) in enumerate(zip(ratios.values(), values, strict=True)):
            axes.annotate(
                f" {value:.2f}x", (ratio.high, position), va="center", xytext=(3, 0), textcoords="offset points"
            )
        axes.invert_yaxis()
        axes.axvline(1.0, color="#333333", linewidth=1, linestyle=":")
        axes.set_xlim(0, 1.15 * max(ratio.high for ratio in ratios.values()))
        axes.set_xlabel("times as fast as eager, median of paired rounds and its 95 % interval")
        _finish(figure, axes, path, title, caption)


def classes(before: Mapping[str, float], after: Mapping[str, float], path: Path, *, title: str, caption: str) -> None:
    """Where a step's milliseconds go, eager above fused."""
    with pyplot.rc_context(_STYLE):
        figure, axes = pyplot.subplots(figsize=(WIDTH_INCHES, 3.0))
        names = [name for name in CLASS_COLOURS if name in before or name in after]
        starts = [0.0, 0.0]
        least = 0.05 * max(sum(before.values()), sum(after.values()))
        for name in names:
            widths = [before.get(name, 0.0), after.get(name, 0.0)]
            axes.barh(["eager", "fused"], widths, left=starts, color=CLASS_COLOURS[name], label=name)
            for row, (start, width) in enumerate(zip(starts, widths, strict=True)):
                if width > least:
                    axes.text(start + width / 2, row, f"{width:.0f}", ha="center", va="center", color="white")
            starts = [start + width for start, width in zip(starts, widths, strict=True)]
        axes.invert_yaxis()
        axes.set_xlabel("milliseconds a step")
        axes.legend(ncols=len(names), loc="upper left", bbox_to_anchor=(0, 1.16), frameon=False)
        _finish(figure, axes, path, title, caption)


def conditions(facts: Mapping[str, object]) -> str:
    """The conditions in one line, for below a chart."""
    return ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None)


def curves(series: Mapping[str, Sequence[float]], path: Path, *, title: str, xlabel: str, ylabel: str) -> None:
    """One line for each name, over steps."""
    with pyplot.rc_context(_STYLE):
        figure, axes = pyplot.subplots(figsize=(WIDTH_INCHES, 3.4))
        for name, values in series.items():
            axes.plot(range(1, len(values) + 1), values, label=name, color=OURS if FUSED in name else THEIRS)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.legend(frameon=False)
        _finish(figure, axes, path, title, "")


def _finish(figure: Any, axes: Axes, path: Path, title: str, caption: str) -> None:
    axes.set_title(fill(title, 90), loc="left", fontsize=12, pad=26 if axes.get_legend() else 8)
    figure.text(0.01, 0.01, fill(caption, 130), fontsize=8, color="#555555", va="bottom")
    figure.tight_layout(rect=(0, 0.06 if caption else 0, 1, 1))
    figure.savefig(path, dpi=DPI)
    pyplot.close(figure)

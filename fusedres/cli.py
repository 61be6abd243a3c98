"""The commands of `python -m fusedres`; what they do is in `machine`, `doctor` and `bench`."""

from __future__ import annotations

import json
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from fusedres import build, cache, commands, fusion, machine, tuning
from fusedres.bench import charts, comparison, kernels, networks, profiling, tables
from fusedres.bench.ceilings import measure as measure_ceilings
from fusedres.bench.comparison import Comparison
from fusedres.bench.contestants import BASELINE, CHANNELS_LAST, ENTRIES, FUSED, PEERS, Absent, Entry, in_channels_last
from fusedres.bench.roofline import designs
from fusedres.bench.timing import plain
from fusedres.bench.work import DTYPES, Work
from fusedres.tuning.backends import SHAPES, rank
from fusedres.tuning.kernels import BATCH, shapes_at, tune_shapes
from fusedres.tuning.products import tune_products

PROGRAM = "python -m fusedres"


class Precision(str, Enum):
    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


app = typer.Typer(
    help="Fused residual blocks for PyTorch: what this machine has, whether it works, and how fast it is.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
# Where there is no terminal to fit, a table gets the width that it needs.
console = Console(
    markup=False, emoji=False, highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160
)
_settings = {"debug": False}


@app.callback()
def settings(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    _settings["debug"] = debug
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own messages would break the bars


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="The same for programs.")] = False) -> None:
    """Versions, devices, instruction sets, caches, and which backend serves which op."""
    raise typer.Exit(commands.info(as_json=as_json))


@app.command()
def doctor() -> None:
    """Try every op on every backend against fp64, and say how to mend what is missing."""
    raise typer.Exit(commands.doctor())


@app.command("build")
def compile_libraries(
    libraries: Annotated[
        list[commands.LibraryName] | None,
        typer.Argument(metavar="[LIBRARY]...", help="cpu, cuda or both; by default what this torch can use."),
    ] = None,
) -> None:
    """Compile the libraries now instead of at first use."""
    raise typer.Exit(commands.build([library.value for library in libraries or []]))


@app.command()
def tune(
    model: Annotated[str | None, typer.Argument(help="As for bench; resnet50 if left out. For a CPU alone.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Images in a step; 8 on a CPU, 256 on a GPU.")] = None,
    size: Annotated[int | None, typer.Option(min=8, help="Height and width; the model's own if left out.")] = None,
    dtype: Annotated[Precision, typer.Option(help="What is computed in, on a CPU by autocast.")] = Precision.BF16,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; cuda where there is one.")] = None,
) -> None:
    """Time the convolutions of a training step on a CPU, kernels and their configurations on a GPU; keep the times.

    On a GPU the shapes are those of ResNets.
    """
    where = _device(device)
    if where.type == "cuda" and (model or size):
        raise typer.BadParameter("MODEL and --size are for --device cpu; a GPU is tuned at the shapes of ResNets")
    with _progress() as bar:
        task = bar.add_task("tuning", total=None)

        def notice(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        if where.type == "cuda":
            shapes, dtypes = shapes_at(batch or BATCH), (DTYPES[dtype.value],)
            tune_shapes(shapes, stems=shapes[:1], dtypes=dtypes, device=where, progress=notice)
            found = tune_products(images=batch or BATCH, dtypes=dtypes, device=where, progress=notice)
            ranked = rank(shapes if batch else SHAPES, dtypes=dtypes, device=where, progress=notice)
            found = f"{found}\n{ranked}"
        else:
            found = _tune_model(model or "resnet50", batch or 8, size, DTYPES[dtype.value], notice)
    console.print(str(found))


def _tune_model(
    name: str, batch: int, size: int | None, dtype: torch.dtype, notice: Callable[[int, int], None]
) -> tuning.Tuning:
    network = networks.build(name)
    work = Work(name, True, batch, size or networks.image_size(network), dtype, torch.device("cpu"))
    network, images = in_channels_last(network, work)
    fusion.fuse(network)
    with work.precision():
        return tuning.tune(network, images, progress=notice)


@app.command("cache")
def show_cache(
    prune: Annotated[
        bool, typer.Option("--prune", help="Remove what was built for older sources, compilers or torches.")
    ] = False,
    clear: Annotated[bool, typer.Option("--clear", help="Remove all that was built and tuned.")] = False,
) -> None:
    """Where compiled libraries and tuned configurations are kept, how large they are; remove old ones, or all."""
    if prune or clear:
        removed = build.clear() if clear else build.prune(machine.TARGETS)
        console.print("\n".join(["removed:" if removed else "nothing to remove", *(f"  {p.name}" for p in removed)]))
    root = cache.location()
    kept = [*cache.entries(root), *cache.tables(root)]
    console.print(f"{root}: {sum(map(cache.size, kept)) / 2**20:.1f} MiB{'' if kept else ', empty'}")
    for path in kept:
        console.print(f"  {path.name}  {cache.size(path) / 2**20:.2f} MiB")


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help="A name of torchvision or timm, or module:function.")] = "resnet50",
    train: Annotated[bool, typer.Option("--train/--infer", help="A training step, or a forward.")] = True,
    batch: Annotated[int, typer.Option(min=1, help="Images in a step.")] = 8,
    size: Annotated[int | None, typer.Option(min=8, help="Height and width; the model's own if left out.")] = None,
    dtype: Annotated[Precision, typer.Option(help="What autocast computes in; fp32 is without it.")] = Precision.FP32,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; cuda where there is one.")] = None,
    peers: Annotated[
        bool | None, typer.Option(help="onnxruntime and OpenVINO too, where installed; as a rule with --infer.")
    ] = None,
    skip: Annotated[list[str] | None, typer.Option(help="Leave a contestant out, such as torch.compile.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often each contestant is timed.")] = 25,
    seconds: Annotated[float, typer.Option(help="When to stop timing, all rounds run or not.")] = 300.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything measured.")] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write a row for each contestant.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a chart, as PNG.")] = None,
    ceilings: Annotated[bool, typer.Option("--ceilings", help="Measure the device's ceilings instead.")] = False,
    keep_pages: Annotated[bool, typer.Option("--keep-pages", help="Let malloc keep its pages (Linux).")] = False,
) -> None:
    """Compare a model with itself fused, compiled and run by peers: checked first, then timed in turn."""
    if keep_pages and machine.malloc_mode() == "default":
        os.execve(sys.executable, [sys.executable, "-m", "fusedres", *sys.argv[1:]], os.environ | machine.PAGES_KEPT)
    where = _device(device)
    if ceilings:
        limits = measure_ceilings(where, DTYPES[dtype.value])
        console.print(f"copy {limits.copy / 1e9:.1f} GB/s, {dtype.value} matmul {limits.matmul / 1e9:.0f} GFLOP/s")
        return
    network = networks.build(model)
    work = Work(model, train, batch, size or networks.image_size(network), DTYPES[dtype.value], where)
    wants_peers = peers if peers is not None else not train
    entries = _entries(ENTRIES | (PEERS if wants_peers else {}), skip or [])
    found = comparison.begin(work, _command())
    status = 0
    try:
        _compare(network, work, entries, found, rounds, seconds)
    except KeyboardInterrupt:
        status = commands.INTERRUPTED
    _publish(found, json_file, csv_file, plot)
    raise typer.Exit(status)


def _entries(entries: dict[str, Entry], skip: list[str]) -> dict[str, Entry]:
    """The contestants but those to be skipped."""
    optional = [name for name in entries if name != BASELINE]
    for name in skip:
        if name not in optional:
            raise typer.BadParameter(f"--skip takes one of {', '.join(optional)}; got {name!r}")
    return {name: entry for name, entry in entries.items() if name not in skip}


def _compare(
    network: nn.Module, work: Work, entries: Mapping[str, Entry], found: Comparison, rounds: int, seconds: float
) -> None:
    """Fill the comparison beside a live bar."""
    with _progress() as bar:
        checking = bar.add_task("checking", total=len(entries) + 1)

        def notice(name: str) -> None:
            bar.update(checking, description=f"checking {name}", advance=1)

        steps = comparison.prepare(network, work, entries, found, notice)
        bar.update(checking, description="checked")
        timing = bar.add_task("timing", total=rounds)
        comparison.race(steps, work, found, rounds=rounds, seconds=seconds, on_round=lambda: bar.advance(timing))


def _publish(found: Comparison, json_file: Path | None, csv_file: Path | None, plot: Path | None) -> None:
    """Show and write what there is; an interrupted comparison has its rounds so far."""
    console.print(tables.comparison(found))
    if json_file is not None:
        json_file.write_text(json.dumps(plain(found), indent=1, allow_nan=False) + "\n")
    if csv_file is not None:
        csv_file.write_text(found.csv())
    if plot is not None and any(result.ratio for result in found.results):
        charts.comparison(found, plot)


@app.command()
def profile(
    model: Annotated[str, typer.Argument(help="A name of torchvision or timm, or module:function.")],
    train: Annotated[bool, typer.Option("--train/--infer", help="A training step, or a forward.")] = True,
    batch: Annotated[int, typer.Option(min=1, help="Images in a step.")] = 8,
    size: Annotated[int | None, typer.Option(min=8, help="Height and width; the model's own if left out.")] = None,
    dtype: Annotated[Precision, typer.Option(help="What autocast computes in; fp32 is without it.")] = Precision.FP32,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; cuda where there is one.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a chart, as PNG.")] = None,
    trace: Annotated[Path | None, typer.Option(help="A folder for Chrome traces, which Perfetto shows.")] = None,
    count_bytes: Annotated[
        bool, typer.Option("--bytes", help="List the operators and what they move instead.")
    ] = False,
) -> None:
    """Where a step's time goes, by class and by layer, before and after fuse."""
    where = _device(device)
    network = networks.build(model)
    work = Work(model, train, batch, size or networks.image_size(network), DTYPES[dtype.value], where)
    found = comparison.begin(work, _command())
    if count_bytes:
        roofline = designs(network, work.images().shape, training=train, dtype=work.dtype)
        counted = kernels.of_model(network, work)
        console.print(tables.kernels(found.work, counted, roofline, batch), tables.conditions(found.conditions))
        return
    entries = {name: ENTRIES[name] for name in (CHANNELS_LAST, FUSED)}
    with _progress() as bar:
        task = bar.add_task("checking", total=len(entries) + 4)

        def notice(text: str) -> None:
            bar.update(task, description=text, advance=1)

        steps = comparison.prepare(network, work, entries, found, lambda name: notice(f"checking {name}"))
        if FUSED not in steps:
            raise Absent(str(found.results[-1].absent))
        profiles = []
        for name, step in steps.items():
            notice(f"profiling {name}")
            profiles.append(profiling.profile(step, where, trace=_trace_file(trace, name)))
        notice("measuring the ceilings")
        limits = measure_ceilings(where, work.dtype)
    eager, fused = profiles
    rows = list(profiling.rows(network, work, eager, fused, limits))
    console.print(
        tables.classes(found.work, eager, fused), tables.layers(rows, limits), tables.conditions(found.conditions)
    )
    if plot is not None:
        charts.profile(eager.classes, fused.classes, rows, plot, title=found.work, caption=charts.caption(found))


def _trace_file(folder: Path | None, name: str) -> Path | None:
    if folder is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name.replace(' ', '-')}.json"


def _command() -> str:
    return shlex.join([*PROGRAM.split(), *sys.argv[1:]])


def _progress() -> Progress:
    """A bar on stderr, so that stdout has the results alone; none where nobody watches."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    watched = sys.stderr.isatty()
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not watched)


def _device(name: str | None) -> torch.device:
    if name not in (None, "cpu", "cuda"):
        raise typer.BadParameter(f"must be cpu or cuda; got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("torch finds no CUDA device")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def main() -> int:
    """Run the command line: errors are one line, and an interrupted command's status is 130."""
    try:
        return app(sys.argv[1:] or ["--help"], prog_name=PROGRAM, standalone_mode=False) or 0
    except Exception as error:
        if _settings["debug"]:
            traceback.print_exc()
        return commands.fail(_sentence(error), status=getattr(error, "exit_code", 1))


def _sentence(error: Exception) -> str:
    """What went wrong, and what to do next."""
    if isinstance(error, typer.Abort):
        return "interrupted"
    wrong_use = getattr(error, "format_message", None)  # typer's own errors, of whichever of its versions
    if wrong_use is not None:
        context = getattr(error, "ctx", None)
        return f"{wrong_use().rstrip('.')}; see {context.command_path if context else PROGRAM} --help"
    return commands.explain(error)

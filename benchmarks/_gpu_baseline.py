"""Stages `baseline-*`: whole networks, eager against torch.compile against fusedres, taking turns.

Nothing is timed before it is right: a contestant's logits, loss, gradients and running statistics must be as
near to a float32 truth as eager's are. A compiled one must be one whole graph, also while it is timed.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from _gpu_lanes import (
    FLOOR,
    HOPELESS,
    SLACK,
    Contestant,
    Lane,
    Task,
    disagreement,
    new_lane,
    new_task,
    relative_errors,
    true_outcome,
)
from _gpu_stage import Run, one_line, release

from fusedres.bench.timing import Report, interleave, speedup

Record = dict[str, Any]

COMPILE_RESERVE_S = 75.0  # a compilation can't be interrupted: none begins with less than this left
TIMING_S = 40.0

EAGER = Contestant("eager")
FUSED = Contestant("fused", library="fusedres")
TRAINERS = (
    EAGER,
    Contestant("compile", compile_mode="default"),
    FUSED,
    Contestant("fused-compile", library="fusedres", compile_mode="default"),
)
# Where launches count: without CUDA graphs, and the whole step of either captured in one.
SMALL_TRAINERS = (
    EAGER,
    Contestant("compile", compile_mode="default"),
    FUSED,
    Contestant("compile-graph", compile_mode="default", graph=True),
    Contestant("fused-graph", library="fusedres", graph=True),
)
TRAINERS_AUTOTUNED = (EAGER, FUSED, Contestant("max-autotune", compile_mode="max-autotune"))

# Served weights are bf16 themselves: autocast casts all of them again at every call, as `eager-amp` shows.
SERVED = Contestant("eager", amp=False)
SERVED_FUSED = Contestant("fused", library="fusedres", amp=False)
SERVERS = (
    SERVED,
    Contestant("eager-amp"),
    Contestant("eager-graph", amp=False, graph=True),
    Contestant("compile", compile_mode="default", amp=False),
    SERVED_FUSED,
    Contestant("fused-graph", library="fusedres", amp=False, graph=True),
    Contestant("optimized", amp=False, optimized=True),
    Contestant("optimized-graph", amp=False, graph=True, optimized=True),
    Contestant("optimized-own-graph", amp=False, optimized=True, own_graph=True),
)
SERVERS_AUTOTUNED = (SERVED, SERVED_FUSED, Contestant("max-autotune", compile_mode="max-autotune", amp=False))


@dataclass(frozen=True)
class Contest:
    """Contestants that are timed against each other; the first of them is eager."""

    network: str
    batch: int
    training: bool
    contestants: tuple[Contestant, ...]
    wanted: tuple[tuple[str, str, float], ...] = ()  # which contestant, times as fast as which, how many times

    @property
    def name(self) -> str:
        autotuned = any(contestant.compile_mode == "max-autotune" for contestant in self.contestants)
        work = "train" if self.training else "infer"
        return f"{self.network}-{work}-b{self.batch}{'-autotuned' if autotuned else ''}"


def train(network: str, run: Run, report: Report) -> list[str]:
    """The fast compilers first, at every batch size; max-autotune in the time left, largest batch first."""
    network, batches = run.pick((network, (256, 64)), ("resnet18", (8,)))
    groups = (TRAINERS, TRAINERS_AUTOTUNED)
    wanted = {("resnet50", 256): (("fused", "eager", 1.22),)}
    contests = [Contest(network, size, True, group) for group in groups for size in batches]
    contests = [replace(c, wanted=wanted.get((c.network, c.batch), ())) for c in contests]
    return hold_all(contests, run, report)


def train_small(run: Run, report: Report) -> list[str]:
    places = run.pick((("resnet18", 32), ("cifar/resnet18", 128)), (("cifar/resnet18", 4),))
    wanted = ("fused", "compile", 1.0), ("fused-graph", "compile-graph", 1.0)
    return hold_all([Contest(*place, True, SMALL_TRAINERS, wanted) for place in places], run, report)


def infer(run: Run, report: Report) -> list[str]:
    networks, batches = run.pick(("resnet50", "resnet18"), ("resnet18",)), run.pick((1, 256, 32), (2,))
    places = [(network, size) for network in networks for size in batches]
    groups = (SERVERS, SERVERS_AUTOTUNED)
    return hold_all([Contest(*place, False, group) for group in groups for place in places], run, report)


def hold_all(contests: list[Contest], run: Run, report: Report) -> list[str]:
    torch.backends.cudnn.allow_tf32 = False  # the truth is float32; no contestant computes in it
    records: dict[str, Record] = {}
    report.data |= {"gate": {"slack": SLACK, "floor": FLOOR, "hopeless": HOPELESS}, "contests": records}
    for contest in contests:
        facts = {"batch": contest.batch, "wanted": contest.wanted}
        record = records[contest.name] = {**facts, "contestants": {}, "reason": None}
        if run.left() < run.pick(COMPILE_RESERVE_S, 1.0):
            record["reason"] = "skipped: no time left in this stage"
            continue
        print(f"  {contest.name}", file=sys.stderr, flush=True)
        try:
            hold(contest, run, report, record)
        except Exception as error:  # out of memory, say: the next contest may be smaller
            record |= {"reason": f"failed: {one_line(error)}", "traceback": traceback.format_exc()}
        torch.compiler.reset()
        release(run)
    report.save()
    return list(problems(records))


def problems(records: Mapping[str, Record]) -> Iterator[str]:
    for contest, record in records.items():
        if "traceback" in record:
            yield f"{contest}: {record['reason']}"
        for name, entry in record["contestants"].items():
            if entry["status"] == "failed":
                yield f"{contest}: {name}: {entry['reason']}"
        yield from (f"{contest}: {miss}" for miss in record.get("misses", ()))


def hold(contest: Contest, run: Run, report: Report, record: Record) -> None:
    """Prepare and check every contestant, then time those that may run, saving after each step."""
    task = new_task(contest.network, contest.batch, training=contest.training, run=run)
    torch.backends.cudnn.benchmark = False  # the search through float32 algorithms would outlast the one use
    truth = true_outcome(task)
    torch.backends.cudnn.benchmark = True
    entries: dict[str, Record] = record["contestants"]
    lanes: dict[str, Lane] = {}
    for contestant in contest.contestants:
        print(f"    {contestant.name}", file=sys.stderr, flush=True)
        entry = entries[contestant.name] = {"status": "preparing", "reason": None}
        report.save()
        if reason := obstacle(contestant, run):
            entry |= {"status": "skipped", "reason": reason}
            continue
        try:
            lane = prepare(contestant, task, entry, run)
            entry["error"] = relative_errors(lane.outcome(), truth)
            entry["reason"] = disagreement(entry["error"], entries["eager"]["error"])
            entry["status"] = "failed" if entry["reason"] else "ready"
            if entry["status"] == "ready":
                entry |= peak_memory(lane, entry, run)
                lanes[contestant.name] = lane
        except Exception as error:  # a contestant that breaks is a result, and the others still run
            entry |= {"status": "failed", "reason": one_line(error), "traceback": traceback.format_exc()}
        if "eager" not in lanes:
            return
    time_all(lanes, run, report, record)


def obstacle(contestant: Contestant, run: Run) -> str | None:
    """Why a contestant can't take part here; None when it can."""
    if (contestant.graph or contestant.own_graph) and not run.cuda:
        return "CUDA graphs need CUDA"
    if contestant.compile_mode and run.left() < run.pick(COMPILE_RESERVE_S, 1.0):
        return "no time left to compile"
    try:
        importlib.import_module("fusedres.models") if contestant.library == "fusedres" else None
    except ImportError as error:
        return str(error)
    return None


def prepare(contestant: Contestant, task: Task, entry: Record, run: Run) -> Lane:
    """Build, compile and warm up, noting the memory it began at and how many graphs the compiler made."""
    release(run)
    entry["began_at_bytes"] = torch.cuda.memory_allocated(run.device) if run.cuda else 0
    entry["began_at_reserved_bytes"] = torch.cuda.memory_reserved(run.device) if run.cuda else 0
    began, graphs, skips = run.left(), unique_graphs(), cudagraph_skips()
    lane = new_lane(contestant, task, run)
    for _ in range(3):  # compile, record, replay
        lane.outcome()
    entry |= {
        "warm_up_s": began - run.left(),
        "graphs": unique_graphs() - graphs,
        "cudagraph_skips": cudagraph_skips() - skips,
    }
    if contestant.compile_mode and entry["graphs"] != 1:
        raise RuntimeError(f"compiled into {entry['graphs']} graphs, expected 1")
    return lane


def unique_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def cudagraph_skips() -> int:
    """How often the compiler gave up a CUDA graph that its mode asked for; it only logs that."""
    return torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


def peak_memory(lane: Lane, entry: Record, run: Run) -> Record:
    """Bytes that a contestant alone adds at its peak, the batch not counted.

    `peak_bytes` is of live tensors; a CUDA graph's memory shows only in `peak_reserved_bytes`, which counts
    cached blocks too.
    """
    if run.cuda:
        release(run)
        torch.cuda.reset_peak_memory_stats(run.device)
    for _ in range(2):
        lane.step()
    if not run.cuda:
        return {"peak_bytes": None, "peak_reserved_bytes": None}
    torch.cuda.synchronize(run.device)
    return {
        "peak_bytes": torch.cuda.max_memory_allocated(run.device) - entry["began_at_bytes"],
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(run.device) - entry["began_at_reserved_bytes"],
    }


def time_all(lanes: Mapping[str, Lane], run: Run, report: Report, record: Record) -> None:
    entries: dict[str, Record] = {name: record["contestants"][name] for name in lanes}
    for entry in entries.values():
        entry |= {"status": "timed", "samples_ms": []}
    graphs = unique_graphs()
    rounds = interleave(
        {name: lane.step for name, lane in lanes.items()},
        run.device,
        rounds=run.pick(30, 3),
        sample_ms=run.pick(60, 1),
        seconds=min(TIMING_S, max(5.0, run.left() - 15)),
    )
    for times in rounds:
        for name, milliseconds in times.items():
            entries[name]["samples_ms"].append(milliseconds)
        report.save()
    recompiled = unique_graphs() != graphs
    for entry in entries.values():
        judge(entry, entries["eager"], record["batch"])
        if recompiled and entry["graphs"]:
            entry |= {"status": "failed", "reason": "a graph was compiled again while it was timed"}
    record["misses"] = list(misses(entries, record)) if run.cuda else []
    report.save()


def misses(entries: Mapping[str, Record], record: Record) -> Iterator[str]:
    """Whom the fused network has to be ahead of, and by how much, and is not."""
    for ours, other, least in record["wanted"]:
        if ours in entries and other in entries:
            ratio = speedup(entries[other]["samples_ms"], entries[ours]["samples_ms"])
            if ratio.low < least:
                yield f"{ours} is {ratio} times as fast as {other}, {least:g} wanted"


def judge(entry: Record, eager: Record, images: int) -> None:
    entry["rounds"] = len(entry["samples_ms"])
    entry["median_ms"] = median(entry["samples_ms"])
    entry["images_per_s"] = images / entry["median_ms"] * 1e3
    entry["speedup_over_eager"] = speedup(eager["samples_ms"], entry["samples_ms"])


def summary(data: dict[str, Any]) -> Iterator[str]:
    for contest, record in data.get("contests", {}).items():
        yield f"{contest}: {record['reason'] or ''}".rstrip(": ")
        for name, entry in record["contestants"].items():
            if "speedup_over_eager" not in entry:
                yield f"  {name:14} {entry['status']}: {entry['reason'] or 'cut short'}"
                continue
            ratio = "{median:.3f} [{low:.3f}, {high:.3f}]".format(**entry["speedup_over_eager"])
            peak = f"{entry['peak_bytes'] / 2**30:6.2f} GiB" if entry["peak_bytes"] else ""
            rate = f"{entry['images_per_s']:9.1f} img/s"
            yield f"  {name:14} {rate}  {ratio} n={entry['rounds']}  {peak}  {entry['reason'] or ''}".rstrip()

"""What benchmarks/gpu.py wants of what it measured on a GPU: made-up measurements that meet it, and that miss it."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch):
    """A stage's module by name: they stand beside the program and not in a package."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return lambda name: importlib.import_module(f"_gpu_{name}")


NCU = """
==PROF== Connected to process 7
==PROF== Profiling "forward_kernel" - 0: 0%....50%....100% - 1 pass
"ID","Process ID","Kernel Name","dram__bytes_read.sum","lts__t_sectors_srcunit_tex_op_read.sum"
"","","","byte","sector"
"0","7","forward_kernel<(Kind)0, BFloat16, (int)8, (Order)1>(Forward)","6,500,000","210,000"
"1","7","backward_kernel<(Kind)0, BFloat16, (int)8, (Order)1>(Backward)","6,700,000","215,000"
"""


def test_ncus_table_is_read(stage) -> None:
    rows = list(stage("traffic").parse(NCU))
    assert [row["kernel"].partition("<")[0] for row in rows] == ["forward_kernel", "backward_kernel"]
    assert [(row["memory_bytes"], row["cache_bytes"]) for row in rows] == [(6.5e6, 6.72e6), (6.7e6, 6.88e6)]
    assert not list(stage("traffic").parse("==ERROR== no permission"))


@pytest.mark.parametrize(
    "place, mb, size, complaint",
    [
        ("memory_bytes", 6.5, 3.2e6, None),
        ("memory_bytes", 9.7, 3.2e6, "forward_kernel reads 3.03 tensors (memory_bytes), 2.00 wanted"),
        ("cache_bytes", 9.7, 3.2e6, "forward_kernel reads 3.03 tensors (cache_bytes), 2.00 wanted"),
        ("memory_bytes", 97.0, 32e6, None),
    ],
)
def test_x_is_wanted_to_be_read_once_where_it_fits_on_chip(stage, place, mb, size, complaint) -> None:
    rows = list(stage("traffic").parse(NCU))
    rows[0][place] = mb * 1e6
    found = list(stage("traffic").problems("shape", size, {"kernels": rows}))
    assert found == ([] if complaint is None else [f"shape: {complaint}"])


def test_counts_that_are_missing_are_problems(stage) -> None:
    problems = stage("traffic").problems
    assert "ERR_NVGPUCTRPERM" in next(problems("shape", 1, {"error": "==ERROR== ERR_NVGPUCTRPERM\n"}))
    assert [line.split(": ")[1] for line in problems("shape", 1, {"kernels": []})] == [
        "no forward_kernel ran",
        "no backward_kernel ran",
    ]


def timed(shape: tuple[int, ...], cuda_us: float, triton_us: float) -> list[dict[str, Any]]:
    """Rows of a forward, and of a step in which the backward takes as long."""
    times = [
        {"cuda, graph": [times * cuda_us / 1e3] * 3, "triton, graph": [times * triton_us / 1e3] * 3} for times in (1, 2)
    ]
    return [{"shape": list(shape), "ms": ms, "left out": {}} for ms in times]


@pytest.mark.parametrize(
    "shape, cuda_us, triton_us, complaints",
    [
        ((64, 512, 7, 7), 4.9, 9.0, []),
        ((64, 512, 7, 7), 5.2, 9.0, ["takes 5.2 us, 5 wanted"]),
        ((32, 256, 14, 14), 5.2, 9.0, ["takes 5.2 us, 5 wanted"]),
        ((64, 128, 28, 28), 7.0, 10.0, ["takes 70% of Triton's time, 60% wanted"]),
        ((64, 256, 56, 56), 70.0, 70.0, []),
        ((256, 256, 56, 56), 300.0, 500.0, []),
    ],
)
def test_the_cuda_kernels_are_wanted_to_be_faster_than_tritons_while_small(
    stage, shape, cuda_us, triton_us, complaints
) -> None:
    found = list(stage("backends").problems(timed(shape, cuda_us, triton_us), 1e12))
    assert found == [f"{shape}: {name} {words}" for name in ("forward", "backward") for words in complaints]


def test_a_large_tensor_is_wanted_at_copy_bandwidth(stage) -> None:
    shape, size = (256, 256, 56, 56), 256 * 256 * 56 * 56 * 2
    rows = timed(shape, 1e6 * (4 + 1 / 16) * size / 4e12 / 0.91, 1e6)
    found = list(stage("backends").problems(rows, 4e12))
    assert found == [f"{shape}: forward at 91.0% of copy bandwidth, 92% wanted"]


def test_cuda_kernels_that_did_not_run_are_a_problem(stage) -> None:
    rows = timed((64, 512, 7, 7), 1.0, 1.0)
    for row in rows:
        del row["ms"]["cuda, graph"]
        row["left out"]["cuda"] = "there is no nvcc"
    assert list(stage("backends").problems(rows, 1e12)) == [
        "(64, 512, 7, 7): the CUDA kernels did not run: there is no nvcc"
    ]


@pytest.mark.parametrize("fused_ms, complaints", [(1.0, 0), (1.6, 1)])
def test_networks_are_wanted_to_be_as_fast_as_said(stage, fused_ms: float, complaints: int) -> None:
    entries = {"eager": {"samples_ms": [1.9] * 9}, "fused": {"samples_ms": [fused_ms] * 9}}
    record = {"wanted": [("fused", "eager", 1.22), ("fused-graph", "compile-graph", 1.0)]}
    found = list(stage("baseline").misses(entries, record))
    assert len(found) == complaints and all("times as fast as eager, 1.22 wanted" in line for line in found)


def test_every_contest_of_small_networks_has_both_sides_with_and_without_graphs(stage) -> None:
    baseline = stage("baseline")
    names = {contestant.name: contestant for contestant in baseline.SMALL_TRAINERS}
    for plain, other in (("fused", "compile"), ("fused-graph", "compile-graph")):
        assert names[plain].graph == names[other].graph == plain.endswith("graph")
        assert names[plain].library == "fusedres" and names[other].compile_mode == "default"


def test_a_block_end_where_launches_count_has_a_time_to_meet(stage) -> None:
    shape, faster = (64, 512, 7, 7), {"median": 2.0, "low": 1.9, "high": 2.1}
    record = {
        "wanted_shares": stage("ops").SHAPES[shape],
        "longest_us": stage("ops").LONGEST_US[shape],
        "forward_share": 0.1,
        "backward_share": 0.1,
        "forward_ms": {"fused": 6.9e-3},
        "backward_ms": {"fused": 7.1e-3},
        "faster_than": {"compile": faster},
    }
    assert list(stage("ops").problems({"64x512x7x7": record})) == ["64x512x7x7: backward takes 7.1 us, 7 wanted"]

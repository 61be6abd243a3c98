"""SyncBatchNorm in fused blocks over gloo: what every process of a group checks is in shares.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fusedres

pytestmark = pytest.mark.skipif(os.name == "nt", reason="gloo's meeting over a file is tried on Linux and macOS")


def run_workers(count, arguments_of):
    """Run a Python program in `count` processes, and have each of them print `passed`."""
    folders = [str(Path(fusedres.__file__).parents[1]), str(Path(__file__).parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, *arguments_of(str(rank))],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    finished = [worker.communicate(timeout=240) for worker in workers]
    for out, error in finished:
        assert "passed" in out, error[-2000:]


@pytest.mark.parametrize(
    "counts, backend, checks",
    [
        ("1,2,4,1", "native", "equal_one_process"),
        ("3,0", "native", "equal_one_process"),
        ("3,5", "python", "equal_one_process"),
        (
            "3,5",
            "native",
            "equal_one_process,are_as_accurate_as_one_process,know_means_beyond_their_precision,"
            "accumulate_without_synchronising_gradients,exchange_once_each_way,refuse_second_derivatives",
        ),
    ],
)
def test_shares(counts, backend, checks, request, tmp_path):
    if backend == "native":
        request.getfixturevalue("native")
    program = str(Path(__file__).parent / "shares.py")
    run_workers(len(counts.split(",")), lambda rank: [program, checks, rank, str(tmp_path), counts, backend])

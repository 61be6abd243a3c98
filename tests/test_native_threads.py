"""The native kernels in torch's pool of threads: how many work, and calls from threads, teams and tasks of others."""

from __future__ import annotations

import ctypes
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from torch import Tensor

from fusedres import build
from fusedres.native_sources import NATIVE
from fusedres.ops import Norm, bn_act

pytestmark = pytest.mark.usefixtures("native")

LAYOUTS = (torch.channels_last, torch.contiguous_format)

counts_threads = pytest.mark.skipif(
    not Path("/proc/self/schedstat").exists(), reason="only Linux tells how long each thread ran"
)


@pytest.fixture(params=[2, 3])
def several_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


def step(x: Tensor) -> Sequence[Tensor]:
    """y and every gradient of the end of a block, in more pieces than there are threads."""
    leaves = [t.detach().requires_grad_() for t in (x, x + 1, torch.ones(x.shape[1]), torch.zeros(x.shape[1]))]
    y = bn_act(leaves[0], Norm(*leaves[2:], training=True), residual=leaves[1])
    return y.detach(), *torch.autograd.grad(y, leaves, x)


def inputs() -> list[Tensor]:
    return [torch.randn(5, 24 + i, 40, 40).contiguous(memory_format=LAYOUTS[i % 2]) for i in range(8)]


def are_same(found: Sequence[Sequence[Tensor]], expected: Sequence[Sequence[Tensor]]) -> bool:
    return all(torch.equal(*pair) for both in zip(found, expected, strict=True) for pair in zip(*both, strict=True))


def worked() -> dict[str, int]:
    """By thread of this process, the nanoseconds that it ran."""
    return {task.name: int((task / "schedstat").read_text().split()[0]) for task in Path("/proc/self/task").iterdir()}


@counts_threads
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_as_many_threads_work_as_torch_was_told(layout: torch.memory_format) -> None:
    x = torch.randn(8, 64, 56, 56).contiguous(memory_format=layout)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            step(x)
            before = worked()
            for _ in range(10):
                step(x)
            spent = sorted((now - before.get(name, 0) for name, now in worked().items()), reverse=True)
            assert sum(ns > spent[0] / 10 for ns in spent) == count, spent
    finally:
        torch.set_num_threads(1)


IMAGES_ALONE = (64, 64, 3, 56, 1), (512, 512, 3, 7, 1), (1024, 256, 1, 14, 1), (64, 64, 3, 56, 4), (512, 512, 3, 7, 2)


def convolutions_of_one_image() -> Iterator[tuple[str, Callable[[], object]]]:
    ops = torch.ops.fusedres_native
    for inputs, outputs, kernel, size, tile in IMAGES_ALONE:
        x, dy = (torch.randn(1, c, size, size).to(memory_format=torch.channels_last) for c in (inputs, outputs))
        weight, side = torch.randn(outputs, inputs, kernel, kernel), (kernel // 2,) * 2
        windows = (1, 1), side, (1, 1)
        for dtype in (torch.float32, torch.bfloat16):
            image, gradient, taps = x.to(dtype), dy.to(dtype), weight.to(dtype)
            packed = ops.conv_act_pack(taps, 1, tile)
            name = f"{inputs} to {outputs}, {kernel}x{kernel} of {size}x{size}, tile {tile}, {dtype}"
            yield f"y of {name}", partial(ops.conv_act, image, packed, None, None, None, *windows, 1, 1)
            yield f"dx of {name}", partial(ops.conv, gradient, taps, None, None, *windows, tile, True)
            yield f"dweight of {name}", partial(ops.conv_dweight, gradient, image, (kernel, kernel), *windows, tile)


def report_shares() -> None:
    """By convolution, the work of the second thread over that of the first."""
    build.library(NATIVE)
    torch.set_num_threads(2)
    shares = {}
    for name, call in convolutions_of_one_image():
        call()
        before = worked()
        for _ in range(20):
            call()
        first, second, *_ = sorted((now - before.get(task, 0) for task, now in worked().items()), reverse=True)
        shares[name] = second / first
    sys.stdout.write(json.dumps(shares))


@counts_threads
def test_two_threads_share_the_work_of_one_image(run_python: Callable[..., CompletedProcess[str]]) -> None:
    # A thread that waits is to sleep: one that spins counts as one that works.
    done = run_python("import test_native_threads as t; t.report_shares()", OMP_WAIT_POLICY="passive")
    shares = json.loads(done.stdout)
    assert not {name: share for name, share in shares.items() if share < 1 / 4}


def test_eight_threads_with_teams_of_their_own_do_not_disturb_each_other(several_threads: int) -> None:
    given = inputs()
    alone = [step(x) for x in given]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            assert are_same(list(pool.map(step, given)), alone)


def openmp_runtimes() -> set[str]:
    maps = Path("/proc/self/maps").read_text()
    return set(re.findall(r"\S*/lib(?:gomp|iomp|omp)[^/\s]*\.so\S*", maps))


def test_in_a_parallel_region_of_anothers_the_bits_are_the_same(several_threads: int) -> None:
    """Every thread of a team calls the ops, which are to compute by themselves there."""
    given = inputs()[:2]
    expected = [step(x) for x in given]
    (path,) = openmp_runtimes()  # torch's, and no other
    found: list[bool] = []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def body(_: object) -> None:
        found.append(are_same([step(x) for x in given], expected))

    ctypes.CDLL(path).GOMP_parallel(body, None, ctypes.c_uint(several_threads), ctypes.c_uint(0))
    assert found == [True] * several_threads


INFERENCE = """
def one(x: Tensor) -> Tensor:
    y, _ = torch.ops.fusedres_native.affine_act_forward(x, None, None, None, x, None, None, None, None, 1, False)
    return y

def every(xs: List[Tensor]) -> List[Tensor]:
    tasks = [torch.jit.fork(one, x) for x in xs]
    return [torch.jit.wait(task) for task in tasks]
"""


def test_inter_op_tasks_at_once_do_not_disturb_each_other(several_threads: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        unit = torch.jit.CompilationUnit(INFERENCE)
    given = [torch.randn(4, 16 + i, 60, 60).contiguous(memory_format=LAYOUTS[i % 2]) for i in range(12)]
    expected = [torch.relu(x + x) for x in given]
    for _ in range(5):
        assert all(map(torch.equal, unit.every(given), expected))

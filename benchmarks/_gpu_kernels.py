"""Stages `kernels-*`: whether a backend's kernels are right on this device, beyond what a small test can tell.

The CUDA lines of this file have not been run yet: it was written where there is no GPU.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from _gpu_stage import Run, one_line, release
from torch import Tensor

import fusedres
from fusedres import dispatch, numerics, testing
from fusedres.backends import Request, Window
from fusedres.bench.timing import Report, graphed
from fusedres.ops import Norm, bn_act, bn_act_pool

STEM_SHAPE, STEM_WINDOW = (256, 64, 112, 112), Window((3, 3), (2, 2), (1, 1))
THREADS, STREAMS = 8, 4
LISTED = 20
FEWEST_CASES = 600  # every group comes up by then


def kernels(name: str, run: Run, report: Report) -> list[str]:
    """Every check, each on its own: one that fails, or runs out of memory, leaves the others."""
    checks: dict[str, dict[str, Any]] = {}
    with forced(name, run):
        report.data |= {"serves": serving(run), "checks": checks}
        for check in (
            same_bits,
            graph_capture,
            threads_and_streams,
            past_2_31,
            pool_past_2_31,
            out_of_memory,
            shared_cases,  # for as long as there is time: each form of a kernel has to be compiled
        ):
            try:
                found = check(run)
            except Exception as error:
                found = {"wrong": [one_line(error)], "traceback": traceback.format_exc()}
            checks[check.__name__] = found
            report.save()
            release(run)
    return [f"{name}: {wrong}" for name, found in checks.items() for wrong in found["wrong"][:LISTED]]


def forced(name: str, run: Run) -> AbstractContextManager[None]:
    """The backend, or without a GPU whichever serves."""
    return fusedres.use_backend(name) if run.cuda else nullcontext()


def summary(data: dict[str, Any]) -> Iterator[str]:
    yield f"bn_act is served by {data.get('serves')}"
    for name, found in data.get("checks", {}).items():
        yield f"{name:20} {'right' if not found['wrong'] else 'WRONG'} {found.get('what', '')}"


def serving(run: Run) -> str:
    return dispatch.choose(typical("bn_act", run)).name


def typical(op: str, run: Run) -> Request:
    return Request(op, run.device.type, torch.bfloat16, "channels_last", "relu", 1, torch.float32)


def pools(run: Run) -> bool:
    """Whether the backend under test has stems."""
    return dispatch.backend(serving(run)).computes("bn_act_pool")


def shared_cases(run: Run) -> dict[str, Any]:
    """Each case's bar and the pooled one, against eager on this device, of the cases that the backend takes."""
    cases = testing.cases(run.pick(2000, 20), large=run.pick(12, 0))
    if pools(run):
        found = testing.pool_cases(run.pick(600, 6))
        cases = [case for both in zip_longest(cases, found) for case in both if case is not None]
    rows, compared, left_out = [], 0, 0
    for case in cases:
        if run.left() < run.pick(20.0, 0.0):
            break
        try:
            rows += numerics.compare(case, run.device)
            compared += 1
        except dispatch.Unserved:
            left_out += 1
    wrong = [f"{row.case} {row.quantity}: {row.error} beside {row.eager_error}" for row in rows if row.fails_alone()]
    wrong += [str(pool) for pool in numerics.pools(rows) if pool.fails()] if not run.tiny else []
    if compared + left_out < run.pick(FEWEST_CASES, len(cases)):
        wrong.append(f"there was time for {compared + left_out} of {len(cases)} cases")
    return {"wrong": wrong, "what": f"{compared} cases, {left_out} more that the backend objects to, of {len(cases)}"}


class Step:
    """A block's end in training: its tensors, and one forward and backward over them."""

    def __init__(self, run: Run, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> None:
        generator = torch.Generator(run.device).manual_seed(seed)

        def normal(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator, device=run.device, dtype=dtype)

        self.x, self.r, self.dy = (normal(*shape).contiguous(memory_format=torch.channels_last) for _ in range(3))
        self.x.requires_grad_()
        self.r.requires_grad_()
        self.weight, self.bias = (normal(shape[1]).float().requires_grad_() for _ in range(2))
        self.leaves = self.x, self.r, self.weight, self.bias

    def __call__(self) -> list[Tensor]:
        y = bn_act(self.x, Norm(self.weight, self.bias, training=True), residual=self.r)
        return [y.detach(), *torch.autograd.grad(y, self.leaves, self.dy)]


class Stem:
    """A network's stem in training: its tensors, and one forward and backward over them."""

    def __init__(self, run: Run, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> None:
        generator = torch.Generator(run.device).manual_seed(seed)

        def normal(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator, device=run.device, dtype=dtype)

        pooled = *shape[:2], *STEM_WINDOW.output_size(shape[2], shape[3])
        self.x, self.dy = (normal(*t).contiguous(memory_format=torch.channels_last) for t in (shape, pooled))
        self.x.requires_grad_()
        self.weight, self.bias = (normal(shape[1]).float().requires_grad_() for _ in range(2))
        self.leaves = self.x, self.weight, self.bias

    def __call__(self) -> list[Tensor]:
        y = bn_act_pool(self.x, Norm(self.weight, self.bias, training=True), **STEM_WINDOW._asdict())
        return [y.detach(), *torch.autograd.grad(y, self.leaves, self.dy)]


def both(run: Run) -> list[type[Step] | type[Stem]]:
    """What the backend under test has kernels for."""
    return [Step, Stem] if pools(run) else [Step]


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def same_bits(run: Run) -> dict[str, Any]:
    """Twice the same call."""
    wrong = []
    for shape in run.pick(((64, 256, 56, 56), (64, 2048, 7, 7), (8, 35, 9, 9)), ((2, 8, 4, 4),)):
        for step in (kind(run, shape) for kind in both(run)):
            if not equal(step(), step()):
                wrong.append(f"two runs of a {type(step).__name__} over {shape} differ")
    return {"wrong": wrong}


def graph_capture(run: Run) -> dict[str, Any]:
    """A captured step, replayed over new contents, equals the step itself."""
    if not run.cuda:
        return {"wrong": [], "what": "needs CUDA"}
    wrong = []
    for kind in both(run):
        step = kind(run, (64, 256, 56, 56) if kind is Step else (64, 64, 112, 112))
        replay: Callable[[], Any] = graphed(step)
        with torch.no_grad():
            step.x.normal_()
        found = [t.clone() for t in replay()]
        if not equal(found, step()):
            wrong.append(f"the replay of a {type(step).__name__} differs from it")
    return {"wrong": wrong}


def threads_and_streams(run: Run) -> dict[str, Any]:
    """Every thread runs its own step on four streams in turn; all must equal what one thread computed."""
    shape = run.pick((16, 256, 28, 28), (2, 8, 4, 4))
    kinds = both(run)
    steps = [kinds[seed % len(kinds)](run, shape, seed=seed) for seed in range(THREADS)]
    expected = [step() for step in steps]
    if run.cuda:
        torch.cuda.synchronize(run.device)

    def repeat(index: int) -> list[str]:
        wrong = []
        streams = [torch.cuda.Stream(run.device) for _ in range(STREAMS)] if run.cuda else [None]
        for repetition in range(run.pick(50, 2)):
            stream = streams[repetition % len(streams)]
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                found = steps[index]()
            if stream is not None:
                stream.synchronize()
            if not equal(found, expected[index]):
                wrong.append(f"thread {index}, repetition {repetition}")
        return wrong

    with ThreadPoolExecutor(THREADS) as threads:
        found = [wrong for wrongs in threads.map(repeat, range(THREADS)) for wrong in wrongs]
    return {"wrong": found, "what": f"{THREADS} threads x {STREAMS} streams"}


def past_2_31(run: Run) -> dict[str, Any]:
    """First and last images of more than 2^31 elements, against the formula on those images."""
    wrong = []
    shape = run.pick((1400, 128, 112, 112), (4, 8, 4, 4))
    for memory_format in (torch.channels_last, torch.contiguous_format):
        x, r, dy = (
            torch.randn(shape, device=run.device, dtype=torch.bfloat16).contiguous(memory_format=memory_format)
            for _ in range(3)
        )
        x.requires_grad_()
        y = bn_act(x, Norm(training=True), residual=r)
        (dx,) = torch.autograd.grad(y, x, dy)
        expected = two_images(x.detach(), r, dy, y.detach())
        for name, t, (first, last) in (("y", y.detach(), expected[:2]), ("dx", dx, expected[2:])):
            for index, truth in ((0, first), (-1, last)):
                distance = float((t[index].float() - truth).norm() / truth.norm())
                if not distance < 4e-3:  # half a bf16 ulp is 2e-3 of a value
                    wrong.append(f"{name}[{index}] in {memory_format}: off by {distance:.1e}")
        del x, r, dy, y, dx, expected
        release(run)
    return {"wrong": wrong, "what": f"{shape}"}


def two_images(x: Tensor, r: Tensor, dy: Tensor, y: Tensor) -> list[Tensor]:
    """y and dx of the first and last image, in fp32, with sums over all images taken in fp64."""
    count = x.numel() // x.shape[1]
    mean, square, sum_g, sum_gx = (torch.zeros(x.shape[1], dtype=torch.float64, device=x.device) for _ in range(4))
    for image in x:
        mean += image.double().sum((1, 2)) / count
    for image in x:
        square += (image.double() - mean[:, None, None]).square().sum((1, 2)) / count
    rstd = (square + 1e-5).rsqrt()

    def xhat(index: int) -> Tensor:
        return (x[index].double() - mean[:, None, None]) * rstd[:, None, None]

    def g(index: int) -> Tensor:
        return torch.where(y[index] <= 0, 0.0, dy[index].double())

    for index in range(len(x)):
        sum_g += g(index).sum((1, 2)) / count
        sum_gx += (g(index) * xhat(index)).sum((1, 2)) / count
    ys = [torch.relu(xhat(index) + r[index].double()).float() for index in (0, -1)]
    dxs = [
        (rstd[:, None, None] * (g(i) - sum_g[:, None, None] - xhat(i) * sum_gx[:, None, None])).float() for i in (0, -1)
    ]
    return [*ys, *dxs]


def pool_past_2_31(run: Run) -> dict[str, Any]:
    """y and dx of the last image of more than 2^31 elements, by running statistics, against eager on that image."""
    if not pools(run):
        return {"wrong": [], "what": "it has no bn_act_pool"}
    wrong = []
    shape = run.pick((2800, 64, 112, 112), (4, 8, 6, 6))
    running = torch.zeros(shape[1], device=run.device), torch.ones(shape[1], device=run.device)
    for memory_format in (torch.channels_last, torch.contiguous_format):
        x = torch.randn(shape, device=run.device, dtype=torch.bfloat16).contiguous(memory_format=memory_format)
        x.requires_grad_()
        y = bn_act_pool(x, Norm(None, None, *running), **STEM_WINDOW._asdict())
        dy = torch.randn_like(y)
        (dx,) = torch.autograd.grad(y, x, dy)
        last = x.detach()[-1:].clone().requires_grad_()
        expected = F.max_pool2d(bn_act(last, Norm(None, None, *running)), *STEM_WINDOW)
        (expected_dx,) = torch.autograd.grad(expected, last, dy[-1:])
        for name, found, truth in (("y", y[-1:], expected), ("dx", dx[-1:], expected_dx)):
            distance = float((found.detach().float() - truth.detach().float()).norm() / truth.detach().float().norm())
            if not distance < 4e-3:
                wrong.append(f"{name} in {memory_format}: off by {distance:.1e}")
        del x, y, dy, dx
        release(run)
    return {"wrong": wrong, "what": f"{shape}"}


def out_of_memory(run: Run) -> dict[str, Any]:
    """A step that runs out of memory half-way leaves the next one right, and running statistics as they were."""
    if not run.cuda:
        return {"wrong": [], "what": "needs CUDA"}
    wrong = []
    step = Step(run, run.pick((64, 256, 56, 56), (2, 8, 4, 4)))
    expected = step()
    running = torch.zeros(step.x.shape[1], device=run.device), torch.ones(step.x.shape[1], device=run.device)
    size = step.x.numel() * step.x.element_size()
    release(run)
    free = torch.cuda.mem_get_info(run.device)[0]
    # Less than y takes, and then room for y alone.
    for room in (size // 2, size + size // 2):
        hoard = torch.empty(max(0, free - room), dtype=torch.uint8, device=run.device)
        try:
            if room < size:
                bn_act(step.x, Norm(step.weight, step.bias, *running, training=True), residual=step.r)
            else:
                step()
            wrong.append(f"{size} bytes fitted into {room}")
        except RuntimeError as error:
            if "out of memory" not in str(error):
                wrong.append(f"it is not told that memory was short: {one_line(error)}")
        del hoard
        release(run)
    if running[0].any() or not running[1].eq(1).all():
        wrong.append("running statistics moved in a step that ran out of memory")
    if not equal(step(), expected):
        wrong.append("the step after running out of memory differs")
    return {"wrong": wrong}

"""Stage `convolutions`: ResNet-50's 1x1 convolutions on every backend that has them, held to fp64 and raced.

The Triton kernel is tuned first, shape by shape; what is found is kept, as `python -m fusedres tune` keeps it.
The CUDA lines of this file have not been run yet: it was written where there is no GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from _gpu_stage import Run, one_line, release
from torch import Tensor

from fusedres import dispatch
from fusedres.backends import Filter, Geometry
from fusedres.bench.timing import Call, Report, graphed, interleave, speedup
from fusedres.epilogue import RELU
from fusedres.ops import conv_act
from fusedres.tuning import products
from fusedres.tuning.products import Pointwise

BATCHES = (256, 32, 1)
CHECKED_IMAGES = 8  # in fp64
PAST_2_31 = (2800, 112)  # images of 64 channels, and their side
ROUNDS, SAMPLE_MS = 24, 3.0
SHORTEST_S = 12.0
BF16 = torch.bfloat16
Backends = dict[str, Callable[..., Tensor]]


def convolutions(run: Run, report: Report) -> list[str]:
    """What is wrong; slower than cuDNN is not: then it is not chosen."""
    backends, left_out = contestants(run)
    rows: dict[str, Any] = {}
    wrong = past_2_31(run, backends)
    report.data |= {"left out": left_out, "against": baseline(run), "shapes": rows}
    work = [(images, shape) for images in run.pick(BATCHES, (2,)) for shape in products.RESNET50]
    for images, shape in run.pick(work, [(2, Pointwise(8, 16, 6, 2)), (2, Pointwise(16, 8, 5, joins=True))]):
        if run.left() < run.pick(SHORTEST_S, 1.0):
            return [*wrong, f"time for {len(rows)} of {len(work)} shapes"]
        name = name_of(images, shape)
        print(f"  {name}", file=sys.stderr, flush=True)
        found = errors(run, shape, min(images, CHECKED_IMAGES), backends)
        wrong += [f"{name}, {backend}: {error}" for backend, error in found.items() if error is not None]
        if "triton" in backends:
            products.tune_products([shape], images=images, device=run.device)
        rows[name] = race(run, shape, images, backends)
        report.save()
        release(run)
    return wrong


def baseline(run: Run) -> str:
    return "cudnn" if run.cuda else "reference"


def contestants(run: Run) -> tuple[Backends, dict[str, str]]:
    """Who serves such a convolution, and why the others don't."""
    x, taps, _, geometry = products.operands(Pointwise(8, 8, 4), 2, BF16, run.device)
    backends, left_out = {}, {}
    for backend in dispatch.candidates("conv_act"):
        try:
            with dispatch.use_backend(backend.name):
                conv_act(x, taps.weight, taps.bias, stride=geometry.stride)
        except Exception as error:
            left_out[backend.name] = one_line(error)
        else:
            assert backend.convolution is not None  # it is a candidate
            backends[backend.name] = backend.convolution.run
    return backends, left_out


def name_of(images: int, shape: Pointwise) -> str:
    apart = f", stride {shape.stride}" * (shape.stride > 1) + ", residual" * shape.joins
    return f"{images}x{shape.inputs}x{shape.side}x{shape.side} to {shape.outputs}{apart}"


def errors(run: Run, shape: Pointwise, images: int, backends: Backends) -> dict[str, str | None]:
    """Of every backend what is wrong: the largest error in units of the summed terms, beside eager's."""
    x, taps, residual, geometry = given = products.operands(shape, images, BF16, run.device)
    wide = [None if t is None else t.double() for t in (x, taps.weight, taps.bias, residual)]
    exact, eager = formula(shape, *wide), formula(shape, x, taps.weight, taps.bias, residual)
    assert wide[0] is not None and wide[1] is not None
    terms = F.conv2d(wide[0].abs(), wide[1].abs(), None, *geometry) + 5  # 5: more than any bias and residual

    def largest(y: Tensor) -> float:
        return float(((y.double() - exact).abs() / terms).max())

    bar, found = max(1.1 * largest(eager), 4 * torch.finfo(BF16).eps), {}
    for name, backend in backends.items():
        error = largest(backend(*given, RELU, False))
        found[name] = None if error <= bar else f"off by {error:.1e}, {bar:.1e} allowed"
    return found


def formula(shape: Pointwise, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    z = F.conv2d(x, weight, bias, shape.stride)
    return F.relu(z if residual is None else z + residual)


def race(run: Run, shape: Pointwise, images: int, backends: Backends) -> dict[str, Any]:
    """Milliseconds of a call, over buffers that no cache holds together; on CUDA as one graph."""
    calls = {name: all_of(run, shape, images, backend) for name, backend in backends.items()}
    times: dict[str, list[float]] = {}
    for sample in interleave(
        {name: call for name, (call, _) in calls.items()},
        run.device,
        rounds=run.pick(ROUNDS, 3),
        sample_ms=run.pick(SAMPLE_MS, 0.5),
        seconds=run.pick(SHORTEST_S / 2, 1.0),
    ):
        for name, milliseconds in sample.items():
            times.setdefault(name, []).append(milliseconds / calls[name][1])
    first = times[baseline(run)]
    ratios = {name: speedup(first, found) for name, found in times.items() if found is not first}
    return {"cut": cut(shape, images) if "triton" in backends else None, "faster": ratios, "ms": times}


def all_of(run: Run, shape: Pointwise, images: int, backend: Callable[..., Tensor]) -> tuple[Call, int]:
    """One call over every buffer, and how many there are."""
    if run.cuda:
        calls = products.calls_of(shape, images, BF16, run.device, backend)
    else:
        calls = [partial(backend, *products.operands(shape, images, BF16, run.device), RELU, False)]

    def one_by_one() -> None:
        for call in calls:
            call()

    one_by_one()
    return (graphed(one_by_one) if run.cuda else one_by_one), len(calls)


def cut(shape: Pointwise, images: int) -> str:
    """How the Triton kernel cuts it, as tuned."""
    from fusedres.backends.triton import conv_act

    weight, sizes = (shape.outputs, shape.inputs, 1, 1), (images, shape.inputs, shape.side, shape.side)
    return conv_act.form(weight, Geometry((shape.stride, shape.stride)), sizes, BF16)


def past_2_31(run: Run, backends: Backends) -> list[str]:
    """The last image of more than 2^31 elements, against the formula on that image, by rows and with a stride."""
    wrong = []
    images, side = run.pick(PAST_2_31, (2, 6))
    for stride in (1, 2) if "triton" in backends else ():
        shape = Pointwise(64, 64, side, stride)
        x, taps, _, geometry = products.operands(shape, images, BF16, run.device)
        taps = Filter(taps.weight)
        y = backends["triton"](x, taps, None, geometry, RELU, False)
        truth = formula(shape, x[-1:].double(), taps.weight.double(), None, None)
        distance = float((y[-1:].double() - truth).norm() / truth.norm())
        if not distance < 4e-3:  # half a bf16 ulp is 2e-3 of a value
            wrong.append(f"the last of {images} images, stride {stride}: off by {distance:.1e}")
        del x, y
        release(run)
    return wrong


def summary(data: dict[str, Any]) -> Iterator[str]:
    yield from (f"without {name}: {why}" for name, why in data.get("left out", {}).items())
    for name, row in data.get("shapes", {}).items():
        times = ", ".join(f"{backend} {1e3 * median(found):.1f} us" for backend, found in row["ms"].items())
        ratios = ", ".join(f"{backend} {r['median']:.2f}x {data['against']}" for backend, r in row["faster"].items())
        yield f"{name}: {times}; {ratios}{'; cut ' + row['cut'] if row['cut'] else ''}"

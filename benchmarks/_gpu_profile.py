"""Stage `profile`: where eager's step spends the device's time, and which batch-norm kernels it uses."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from _gpu_stage import Run, batch, import_torchvision, release, sgd, training_step
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from fusedres.bench.timing import Call, Report, elapsed_ms

STEPS = 3
NAMES_KEPT = 6

# The first row whose word is in the name of the operator that launched a kernel gives the kernel's class.
CLASSES = (
    ("convolution_backward", "conv backward"),
    ("conv", "conv forward"),
    ("batch_norm_backward", "batch norm backward"),
    ("batch_norm", "batch norm forward"),
    ("threshold_backward", "relu"),
    ("relu", "relu"),
    ("clamp_min", "relu"),
    ("sgd", "optimizer"),
    ("foreach", "optimizer"),
    ("copy", "copies and casts"),
    ("aten::to", "copies and casts"),
    ("clone", "copies and casts"),
    ("pool", "pool"),
    ("aten::addmm", "linear"),
    ("aten::mm", "linear"),
    ("add_", "add"),
    ("aten::add", "add"),
)

Timed = tuple[str, str, float]  # operator, kernel, microseconds


def step_profile(run: Run, report: Report) -> list[str]:
    """Half types are given float32 parameters, as autocast gives them."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    report.data["batch_norm"] = {str(dtype).removeprefix("torch."): batch_norm_kernels(run, dtype) for dtype in dtypes}
    networks: dict[str, object] = {}
    report.data["networks"] = networks
    torch.backends.cudnn.benchmark = True
    for network in run.pick(("resnet50", "resnet18"), ("resnet18",)):
        networks[network] = network_profile(run, network)
        report.save()
        release(run)
    return []


def summary(data: dict[str, Any]) -> Iterator[str]:
    for dtype, found in data.get("batch_norm", {}).items():
        yield f"batch norm, {dtype}, channels_last, training: {found['backend']}"
    for network, found in data.get("networks", {}).items():
        times = f"{found['step_ms']:.2f} ms a step, {found['busy_ms']:.2f} ms of it in kernels"
        yield f"{network} b{found['batch']}: {times}"
        for name, part in found["classes"].items():
            yield f"  {name:20} {part['ms']:9.3f} ms  {part['share']:6.1%}"


def batch_norm_kernels(run: Run, dtype: torch.dtype) -> dict[str, object]:
    """The kernels of one stand-alone batch norm, and whose they are."""
    shape = run.pick((64, 256, 56, 56), (2, 8, 8, 8))
    x = torch.randn(shape, device=run.device).to(dtype, memory_format=torch.channels_last).requires_grad_()
    dy = torch.randn(shape, device=run.device).to(dtype, memory_format=torch.channels_last)
    weight, bias = (torch.rand(shape[1], device=run.device).requires_grad_() for _ in range(2))
    mean, var = torch.zeros(shape[1], device=run.device), torch.ones(shape[1], device=run.device)

    def forward_backward() -> None:
        y = torch.nn.functional.batch_norm(x, mean, var, weight, bias, training=True)
        torch.autograd.grad(y, (x, weight, bias), dy)

    forward_backward()
    timed = [item for item in device_time(run, forward_backward, steps=1) if "batch_norm" in item[0]]
    kernels: defaultdict[str, float] = defaultdict(float)
    for _, kernel, microseconds in timed:
        kernels[kernel] += microseconds
    return {
        "backend": backend(timed),
        "operators": sorted({operator for operator, _, _ in timed}),
        "kernels_us": descending(kernels),
    }


def backend(timed: list[Timed]) -> str:
    """Whose batch norm it was, by operator and kernel names."""
    names = " ".join(f"{operator} {kernel}" for operator, kernel, _ in timed).lower()
    if not timed:
        return "unknown: no batch-norm kernel was seen"
    if "cudnn" in names:
        return "cudnn"
    return "native, channels_last kernels" if "channels_last" in names else "native"


def network_profile(run: Run, network: str) -> dict[str, object]:
    size = run.pick(256, 4)
    model = getattr(import_torchvision().models, network)(weights=None)
    model = model.to(run.device, memory_format=torch.channels_last).train()
    step = partial(training_step, model, sgd(model), *batch(run, size, run.pick(224, 64)))
    for _ in range(3):
        step()
    step_ms = elapsed_ms(step, run.pick(10, 2), run.device)
    timed = device_time(run, step, steps=STEPS)
    busy = sum(microseconds for _, _, microseconds in timed) / STEPS / 1e3
    return {"batch": size, "step_ms": step_ms, "busy_ms": busy, "classes": by_class(timed, busy)}


def device_time(run: Run, call: Call, *, steps: int) -> list[Timed]:
    """Every kernel with the operator that launched it; on a CPU each operator stands for its own kernel."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if run.cuda else [])]
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            call()
        if run.cuda:
            torch.cuda.synchronize(run.device)
    events = profiler.events() or []
    if not run.cuda:
        return [(event.name, event.name, event.self_cpu_time_total) for event in events]
    return [(operator(event), kernel.name, kernel.duration) for event in events for kernel in event.kernels]


def operator(event: FunctionEvent) -> str:
    """The event's operator and those that called it, innermost first: `aten::copy_ < aten::_to_copy < …`."""
    names, at = [], event
    while at is not None:
        names.append(at.name)
        at = at.cpu_parent
    return " < ".join(names)


def by_class(timed: list[Timed], busy_ms: float) -> dict[str, object]:
    """Milliseconds a step, share and the longest kernels of each class, longest class first."""
    classes: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    for name, kernel, microseconds in timed:
        classes[kernel_class(name)][kernel] += microseconds / STEPS / 1e3
    totals = descending({name: sum(kernels.values()) for name, kernels in classes.items()})
    return {
        name: {"ms": ms, "share": ms / busy_ms, "longest_ms": descending(classes[name], NAMES_KEPT)}
        for name, ms in totals.items()
    }


def descending(times: Mapping[str, float], keep: int | None = None) -> dict[str, float]:
    return dict(sorted(times.items(), key=lambda item: item[1], reverse=True)[:keep])


def kernel_class(name: str) -> str:
    innermost = name.split(" < ")[0]
    return next((kind for word, kind in CLASSES if word in innermost), "other")

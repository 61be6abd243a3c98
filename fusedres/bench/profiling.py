"""Where a step's time goes, by class and by layer, beside the least that the device's ceilings allow."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity

from fusedres.bench.ceilings import Ceilings
from fusedres.bench.roofline import Design, Layer, layers
from fusedres.bench.work import Step, Work

# The first pattern that an operator's name contains gives its class; what is called inside belongs to it.
CLASSES = (
    ("conv", re.compile(r"conv", re.IGNORECASE)),
    ("fused", re.compile(r"fusedres_\w+::")),
    ("bn", re.compile(r"batch_?norm", re.IGNORECASE)),
    ("relu", re.compile(r"relu|threshold_backward|clamp_min", re.IGNORECASE)),
    ("add", re.compile(r"^aten::add_?$")),
)
OTHER = "other"
_OPERATOR = re.compile(r"(aten|fusedres_\w+)::")
_OWN = re.compile(r"fusedres_native::conv_?")
_ELEMENTWISE = ("fused", "bn", "relu", "add")

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Profile:
    """One step of one contestant.

    Args:
        classes: milliseconds of each class.
        convolutions: milliseconds by the shapes of input and weight.
        elementwise: milliseconds of norms, additions, activations and fused ops by the tensor's shape.
    """

    classes: Mapping[str, float]
    convolutions: Mapping[tuple[Shape, Shape], float]
    elementwise: Mapping[Shape, float]


@dataclass(frozen=True)
class Row:
    """Layers that are alike: what they took, and the least that they could.

    Args:
        count: how many layers.
        possible: milliseconds at the ceilings, as fusedres has the ops.
    """

    what: str
    shape: Shape
    count: int
    eager: float
    fused: float
    possible: float

    @property
    def share(self) -> float:
        """Of the roofline, as fused."""
        return self.possible / self.fused if self.fused else 0.0


def profile(step: Step, device: torch.device, *, steps: int = 3, trace: Path | None = None) -> Profile:
    """Profile a warm step.

    Args:
        trace: where to write a Chrome trace, which Perfetto shows.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    # acc_events: torch 2.11 warns of cycles otherwise, and there is one
    with torch.profiler.profile(activities=activities, record_shapes=True, acc_events=True) as profiler:
        for _ in range(steps):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    return _profile(profiler.events() or [], device, steps)


def _profile(events: Sequence[FunctionEvent], device: torch.device, steps: int) -> Profile:
    cuda = device.type == "cuda"
    classes: defaultdict[str, float] = defaultdict(float)
    convolutions: defaultdict[tuple[Shape, Shape], float] = defaultdict(float)
    elementwise: defaultdict[Shape, float] = defaultdict(float)
    for event in events:
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue  # a kernel, which its operator counts
        ms = (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e3 / steps
        owner, kind = _owner(event)
        classes[kind] += ms
        if kind == "conv":
            convolutions[_operands(owner)] += ms
        elif kind in _ELEMENTWISE:
            elementwise[_shapes(owner)[0]] += ms
    return Profile(dict(classes), dict(convolutions), dict(elementwise))


def _owner(event: FunctionEvent) -> tuple[FunctionEvent, str]:
    """The outermost operator of a class that calls the event, and that class."""
    owner, kind, at = event, OTHER, event
    while at is not None:
        if _OPERATOR.match(at.name):  # not a node of autograd, which has the same words in its name
            owner, kind = next(((at, name) for name, pattern in CLASSES if pattern.search(at.name)), (owner, kind))
        at = at.cpu_parent
    return owner, kind


def _shapes(event: FunctionEvent) -> list[Shape]:
    shapes: list[Any] = list(event.input_shapes or ())
    return [tuple(shape) for shape in shapes] or [()]


def _operands(convolution: FunctionEvent) -> tuple[Shape, Shape]:
    """The shapes of input and weight, which in the backward come after dy, or one of them does."""
    first, second, *others = _shapes(convolution)
    if "backward" in convolution.name:
        return second, others[0]
    if "dweight" in convolution.name:
        kernel: Any = convolution.concrete_inputs[2]
        return second, (first[1], second[1], *kernel)
    if "conv_dx" in convolution.name:
        size: Any = others[0][2:] or convolution.concrete_inputs[3]  # of what it is added to, or as it was told
        return (first[0], second[1], *size), second
    if first[1] != second[1] and _OWN.fullmatch(convolution.name):  # dy, of x's size where windows are padded
        return (first[0], second[1], *first[2:]), second
    return first, second


def rows(model: nn.Module, work: Work, eager: Profile, fused: Profile, ceilings: Ceilings) -> Iterator[Row]:
    """Alike layers together: convolutions by their shapes, everything elementwise by the tensor's; longest first."""
    groups: defaultdict[tuple[str, Any], list[Layer]] = defaultdict(list)
    shape = (work.batch, work.channels, work.size, work.size)
    for layer in layers(model, shape, training=work.training, dtype=work.dtype):
        if layer.kind == "conv":
            groups["conv", (layer.given, _weight(model, layer))].append(layer)
        elif layer.kind == "elementwise":
            groups["elementwise", layer.shape].append(layer)
    found = []
    for (kind, key), alike in groups.items():
        keys = [key, *_products(alike[0], *key)] if kind == "conv" else [key]
        before, after = (
            sum((profile.convolutions if kind == "conv" else profile.elementwise).get(key, 0.0) for key in keys)
            for profile in (eager, fused)
        )
        possible = 1e3 * sum(layer.seconds(Design.FOLDED, ceilings.matmul, ceilings.copy) for layer in alike)
        what = alike[0].what if kind == "conv" else "norm, add, act"
        found.append(Row(what, alike[0].shape, len(alike), before, after, possible))
    yield from sorted(found, key=lambda row: row.eager, reverse=True)


def _products(layer: Layer, given: Shape, weight: Shape) -> list[tuple[Shape, Shape]]:
    """A strided 1x1 convolution's gradient of x may be found for those pixels alone that it saw."""
    seen = (*given[:2], *layer.shape[2:])
    return [(seen, weight)] if weight[2:] == (1, 1) and seen != given else []


def _weight(model: nn.Module, layer: Layer) -> Shape:
    return tuple(model.get_submodule(layer.name).get_parameter("weight").shape)

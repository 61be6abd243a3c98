"""One step of training or inference: what is timed, and what is compared before anything is timed."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fusedres import eligibility, fusion
from fusedres.swap import Fused

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Outcome = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Work:
    """What every contestant does.

    Args:
        dtype: what autocast computes in; fp32 is without autocast.
    """

    model: str
    training: bool
    batch: int
    size: int
    dtype: torch.dtype
    device: torch.device
    channels: int = 3

    def __str__(self) -> str:
        what = "training step" if self.training else "inference"
        dtype = next(word for word, dtype in DTYPES.items() if dtype is self.dtype)
        return f"{self.model}, {what}, batch {self.batch}, {self.size} x {self.size}, {dtype}, {self.device}"

    def images(self) -> Tensor:
        generator = torch.Generator("cpu").manual_seed(1)
        shape = self.batch, self.channels, self.size, self.size
        return torch.randn(shape, generator=generator, device="cpu").to(self.device)

    def precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not torch.float32)


class Step(Protocol):
    """A contestant ready to run: one timed step, or its results for the comparison."""

    def __call__(self) -> object: ...
    def outcome(self) -> Outcome: ...


class Training:
    """Forward, backward and the optimiser.

    The loss is the mean square of all outputs: it costs what any loss does, fits every model, and no step of it
    diverges.
    """

    def __init__(self, model: nn.Module, images: Tensor, work: Work) -> None:
        self.model, self.images, self.work = model.train(), images, work
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4, fused=True)

    def __call__(self) -> None:
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def outcome(self) -> Outcome:
        """Outputs and gradients of the first step, without dropout; the parameters stay as they are."""
        state = copy.deepcopy(self.model.state_dict())
        with steady(self.model):
            outputs = self.backward()
        gradients = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        self.optimizer.zero_grad()
        self.model.load_state_dict(state)
        return {"outputs": outputs, "gradients": gradients}

    def backward(self) -> dict[str, Tensor]:
        with self.work.precision():
            outputs = tensors(self.model(self.images))
            loss = torch.stack([y.to(_wide(y)).square().mean() for y in outputs.values()]).sum()
        loss.backward()
        return {name: y.detach() for name, y in outputs.items()}


class Inference:
    """A forward without gradients, by a model or by a peer's session."""

    def __init__(self, forward: Callable[[Tensor], object], images: Tensor, work: Work) -> None:
        self.forward, self.images, self.work = forward, images, work

    def __call__(self) -> object:
        with torch.inference_mode(), self.work.precision():
            return self.forward(self.images)

    def outcome(self) -> Outcome:
        return {"outputs": tensors(self())}


def tensors(output: object) -> dict[str, Tensor]:
    """The tensors of a tensor, tuple, dict or model output."""
    leaves = pytree.tree_leaves(output)
    return {str(index): leaf for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


@contextmanager
def steady(model: nn.Module) -> Iterator[None]:
    """Dropout and stochastic depth are off inside: no two contestants would draw alike."""
    probabilities = [(module, name, getattr(module, name)) for module, name in _chances(model)]
    try:
        for module, name, _ in probabilities:
            setattr(module, name, 0.0)
        yield
    finally:
        for module, name, probability in probabilities:
            setattr(module, name, probability)


def _chances(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """The modules that draw at random, as torch, torchvision and timm name their probability."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) or type(module).__name__ == "StochasticDepth":
            yield module, "p"
        elif isinstance(getattr(module, "drop_prob", None), float):
            yield module, "drop_prob"


def exact(model: nn.Module, work: Work) -> Outcome:
    """The results in fp64."""
    images = work.images().double()
    if not work.training:
        with torch.inference_mode():
            return {"outputs": tensors(copy.deepcopy(model).double().eval()(images))}
    return Training(copy.deepcopy(model).double(), images, work).outcome()


def settle(model: nn.Module) -> None:
    """Give a new model the statistics of a trained one, in place.

    Running statistics aren't 0 and 1, and blocks end in a small scale: at scale 1 rounding errors grow from block
    to block until a half-precision gradient is off by more than its own length; at 0 nothing of the branch is seen.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            for statistic, low, high in ((module.running_mean, -0.1, 0.1), (module.running_var, 0.8, 1.2)):
                drawn = torch.rand(statistic.shape, generator=generator, device="cpu") * (high - low) + low
                statistic.copy_(drawn.to(statistic))
    twin = copy.deepcopy(model)
    fusion.fuse(twin)
    for path, block in twin.named_modules():
        for residual in eligibility.residuals(block.description) if isinstance(block, Fused) else ():
            norm = f"{path}.{residual.stages[-1].norm}" if path else residual.stages[-1].norm
            if residual.shortcut is not None:
                nn.init.constant_(model.get_submodule(norm).get_parameter("weight"), 0.2)


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """The most that torch's allocator held during a step, beyond what it held before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    return max(held_bytes(step), default=0)


def held_bytes(call: Callable[[], object]) -> list[int]:
    """What torch's allocator for CPUs held after each of its events during a call, beyond what it held before."""
    # acc_events: torch 2.11 warns of cycles otherwise, and there is one
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profiler:
        result = call()
    del result  # not before its profile ends
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [event for event in events if event.get("name") == "[memory]"]
    held = [event["args"] for event in sorted(changes, key=lambda event: event["ts"])]
    before = held[0]["Total Allocated"] - held[0]["Bytes"] if held else 0
    return [args["Total Allocated"] - before for args in held]

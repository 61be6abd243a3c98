"""The contestants of the baseline stages: how each is built, what it computes, how far off that is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from _gpu_stage import Model, Run, batch, compiled, gradients, sgd, training_step
from torch.utils.checkpoint import checkpoint

import fusedres
from fusedres.bench import networks
from fusedres.bench.timing import graphed

Outcome = dict[str, torch.Tensor]
State = Mapping[str, torch.Tensor]

# A relative error may be 1.5 times eager's or half a bf16 step, but never near 1: zeros would do as well.
SLACK, FLOOR, HOPELESS = 1.5, 2.0**-8, 0.7


@dataclass(frozen=True)
class Contestant:
    name: str
    library: str = "torchvision"
    compile_mode: str | None = None
    amp: bool = True
    graph: bool = False
    optimized: bool = False
    own_graph: bool = False


@dataclass(frozen=True)
class Task:
    """What all contestants of one contest do: the same network, the same weights, the same batch."""

    network: str
    training: bool
    state: State
    images: torch.Tensor
    labels: torch.Tensor


class Lane(Protocol):
    """A contestant ready to run: its whole outcome once, or one step of the timed work."""

    @property
    def step(self) -> Callable[[], object]: ...
    def outcome(self) -> Outcome: ...


class Training:
    def __init__(self, contestant: Contestant, model: torch.nn.Module, call: Model, task: Task) -> None:
        self.model, self.call, self.task = model, call, task
        self.optimizer = sgd(model)
        self.step: Callable[[], object] = graphed(self.once) if contestant.graph else self.once

    def outcome(self) -> Outcome:
        """From the first state, put back in place: a recorded graph reads it at the same addresses."""
        self.model.load_state_dict(self.task.state)
        torch.compiler.cudagraph_mark_step_begin()
        logits, loss = gradients(self.call, self.task.images, self.task.labels)
        result = training_outcome(self.model, logits, loss)
        self.optimizer.zero_grad()
        return result

    def once(self) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        training_step(self.call, self.optimizer, self.task.images, self.task.labels)


class Inference:
    def __init__(self, contestant: Contestant, call: Model, task: Task) -> None:
        self.device, self.amp = task.images.device.type, contestant.amp
        self.call = call
        self.images = task.images if contestant.amp else task.images.bfloat16()
        self.step: Callable[[], object] = graphed(self.answer) if contestant.graph else self.answer

    @torch.inference_mode()
    def answer(self) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.amp):
            return self.call(self.images)

    def outcome(self) -> Outcome:
        logits = self.step()
        assert isinstance(logits, torch.Tensor)
        return {"logits": logits.float()}


def new_task(network: str, size: int, *, training: bool, run: Run) -> Task:
    model = reference_model(network, training=training)
    pixels, classes = networks.image_size(model), model.get_parameter("fc.bias").numel()
    pixels = run.pick(pixels, min(pixels, 64))
    return Task(network, training, model.state_dict(), *batch(run, size, pixels, classes))


def reference_model(network: str, *, training: bool) -> torch.nn.Module:
    """torchvision's network with fixed random weights; its running statistics aren't the initial 0 and 1.

    Branches end in a small scale, much as zero_init_residual has it: at scale 1 the bf16 gradient of a random
    ResNet-50 is off by more than its own length, and any other gradient would agree with it.
    """
    torch.manual_seed(0)
    model = networks.build(network)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.get_buffer("running_mean"), -0.1, 0.1)
            torch.nn.init.uniform_(module.get_buffer("running_var"), 0.8, 1.2)
    for block in blocks(model):
        last = "bn3" if hasattr(block, "bn3") else "bn2"
        torch.nn.init.constant_(block.get_parameter(f"{last}.weight"), 0.2)
    return model.train(training)


def blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [block for layer in range(1, 5) for block in model.get_submodule(f"layer{layer}").children()]


def new_lane(contestant: Contestant, task: Task, run: Run) -> Lane:
    """Build and, if asked to, wrap for compilation; the compiler itself runs at the first outcome."""
    of_fusedres = contestant.library == "fusedres"
    model: Any = (
        getattr(fusedres.models, task.network.replace("/", "_"))() if of_fusedres else networks.build(task.network)
    )
    model.load_state_dict(task.state)
    dtype = torch.float32 if contestant.amp else torch.bfloat16
    model = model.to(task.images.device, dtype, memory_format=torch.channels_last).train(task.training)
    if contestant.optimized:
        example = task.images if task.images.is_cuda else None  # on a CPU it is a rehearsal, and timing takes long
        fusedres.optimize(model, example, cuda_graph=contestant.own_graph)
    call: Model = compiled(model, run, contestant.compile_mode) if contestant.compile_mode else model
    return Training(contestant, model, call, task) if task.training else Inference(contestant, call, task)


def training_outcome(model: torch.nn.Module, logits: torch.Tensor, loss: torch.Tensor) -> Outcome:
    """Everything in the order of its name; a gradient that is missing counts as zeros."""
    parameters = [parameter for _, parameter in sorted(model.named_parameters())]
    dparameters = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    return {
        "logits": logits.detach().float(),
        "loss": loss.detach().float(),
        "gradients": torch.cat([dparameter.flatten().float() for dparameter in dparameters]),
        "running_statistics": running_statistics(model),
    }


def running_statistics(model: torch.nn.Module) -> torch.Tensor:
    buffers = [buffer for _, buffer in sorted(model.named_buffers()) if buffer.is_floating_point()]
    return torch.cat([buffer.flatten() for buffer in buffers])


def true_outcome(task: Task) -> Outcome:
    """The same network in float32, its blocks recomputed in backward: it fits where bf16 training fits."""
    model = reference_model(task.network, training=task.training).to(task.images.device)
    model.load_state_dict(task.state)
    if not task.training:
        with torch.inference_mode():
            return {"logits": model(task.images)}
    for block in blocks(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    logits = model(task.images)
    loss = torch.nn.functional.cross_entropy(logits, task.labels)
    statistics = running_statistics(model)  # now: the recomputation moves them a second time
    loss.backward()
    return training_outcome(model, logits, loss) | {"running_statistics": statistics}


def relative_errors(outcome: Outcome, truth: Outcome) -> dict[str, float]:
    return {name: ((outcome[name] - true).norm() / true.norm()).item() for name, true in truth.items()}


def disagreement(errors: Mapping[str, float], eager: Mapping[str, float]) -> str | None:
    """What is further from the truth than eager allows; written so that NaN disagrees."""
    off = [
        f"{name} off by {error:.2e}, eager by {eager[name]:.2e}"
        for name, error in errors.items()
        if not error <= min(max(SLACK * eager[name], FLOOR), HOPELESS)
    ]
    return "; ".join(off) or None

"""optimize(model): let a model in eval mode run as a plan of fused convolutions, say what became of it, and undo it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from fusedres import eligibility, inference, swap, times
from fusedres.epilogue import IDENTITY
from fusedres.inference.flatten import Flat, flatten
from fusedres.inference.program import backend_of
from fusedres.inference.steps import Convolve, Join, Mode, Normalise, Operation, Plain


@dataclass(frozen=True)
class Line:
    """One step of a plan, or one module that has none.

    Args:
        module: the path of the optimized module; where nothing is, of the module that runs as it always did.
        step: what runs as one operation, such as "layer1.0.conv3+bn3+add+relu".
        backend: who computes a convolution; "plain" where modules and functions are called as they are.
        in_place: whether the result is written over the residual.
        reason: why it is plain, where one would expect better; of a convolution, the times that its backend was
            chosen by.
    """

    module: str
    step: str
    backend: str
    in_place: bool = False
    reason: str | None = None


@dataclass(frozen=True)
class Optimization:
    """What optimize did, step by step; printing it gives a table.

    Args:
        arena_bytes: what intermediate results take, where an example was given; so much again for every further thread
            that calls the model at the same time.
    """

    lines: tuple[Line, ...]
    arena_bytes: int | None = None

    @property
    def convolutions(self) -> tuple[Line, ...]:
        """The steps that a backend's convolution computes whole."""
        return tuple(line for line in self.lines if line.backend != "plain")

    @property
    def plain(self) -> tuple[Line, ...]:
        """What is called as it is."""
        return tuple(line for line in self.lines if line.backend == "plain")

    def to_json(self) -> str:
        """The lines as a JSON list of objects."""
        return json.dumps([asdict(line) for line in self.lines], indent=2)

    def __str__(self) -> str:
        if not self.convolutions:
            reasons = "".join(f"\n{line.module or '(model)'}: {line.reason}" for line in self.plain if line.reason)
            return f"no convolution found that can be optimized{reasons}"
        cells = [("module", "backend", "step")]
        cells += [(line.module or "(model)", line.backend, _words(line)) for line in self.lines]
        widths = [max(len(row[column]) for row in cells) for column in range(2)]
        rows = [f"{module:{widths[0]}}  {backend:{widths[1]}}  {step}" for module, backend, step in cells]
        arena = f", {self.arena_bytes / 2**20:.1f} MiB for what lies between them" if self.arena_bytes else ""
        return "\n".join([*rows, f"{len(self.convolutions)} convolutions, {len(self.plain)} plain steps{arena}"])


def _words(line: Line) -> str:
    return line.step + (", in place" if line.in_place else "") + (f": {line.reason}" if line.reason else "")


def optimize(model: nn.Module, example: Tensor | None = None, *, cuda_graph: bool = False) -> Optimization:
    """Let a model in eval mode run as one plan: every convolution with its norm, shortcut and activation in one call.

    The model stays the same object; only the class of what is optimized changes. In eval mode and without gradients
    its plan runs, in channels_last from end to end: batch norms folded into the convolutions' weights, weights packed
    once, residuals added and activated in the convolution, written in place where nobody else holds them. In training,
    with gradients, under torch.compile and while it is exported or traced, its own forward runs as before.

    With an example, every convolution is timed for its sizes on every backend that can compute it, and the fastest
    taken; that takes seconds, once, since the times are kept for later processes. Without one, and for other sizes,
    kept times are used where there are any. FUSEDRES_TUNE=0 or deterministic algorithms leave the choice to a rule.

    The plan is made at the first call. Intermediate results lie in memory of the plan's own, one piece for each thread
    at a time, until unoptimize; the output never does. Every call looks whether a parameter, buffer, child, hook or
    setting is another than then, and if so makes the plan anew; what is written through a parameter's `.data` can't be
    seen. Where a forward is no provable chain, the chains and blocks in it are optimized by themselves. A copy of the
    model is optimized too, with a plan of its own; a pickle loads as a plain model, with or without fusedres.

    Args:
        model: plain or fused, in eval mode.
        example: an input of the sizes to be served, to make the plan with now instead of at the first call.
        cuda_graph: capture the whole network in CUDA graphs, one for each bucket of batch sizes up to the example's:
            the powers of 2, and the example's own. A batch is padded to its bucket, and the output cut to it. Copies
            of the model have no graphs.

    >>> import fusedres
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    >>> print(fusedres.optimize(model).lines[0].step)
    0+1+relu
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize takes an nn.Module, got {type(model).__name__}")
    if model.training:
        raise ValueError("optimize takes a model in eval mode, and this one is in training; call model.eval() first")
    walk = _Walk(model)
    lines = list(walk.lines())
    if cuda_graph:
        _check_graph(model, example, walk.found, lines)
    before = {module: (isinstance(module, swap.Optimized), inference.held(module)) for module in walk.found}
    try:
        for module in walk.found:
            inference.forget(module)
            swap.optimize(module, inference.serve)
        if example is not None:
            if cuda_graph:
                inference.graph(model, example.shape[0])
            with torch.no_grad(), times.measuring():
                model(example)
    except BaseException:  # Ctrl-C too leaves the model as it was; nothing is swallowed
        for module, (was_optimized, held) in before.items():
            if not was_optimized:
                swap.unoptimize(module)
            inference.hold(module, held)
        raise
    plans = {module: plan for module in walk.found if (plan := inference.latest(module)) is not None}
    for index, (module, step) in walk.origins.items():
        choice = plans[module].choices[step] if module in plans else None
        if choice is not None:
            lines[index] = replace(lines[index], backend=choice.candidate.backend.name, reason=choice.reason)
    return Optimization(tuple(lines), sum(plan.bytes for plan in plans.values()) if plans else None)


def _check_graph(model: nn.Module, example: Tensor | None, found: Sequence[nn.Module], lines: Sequence[Line]) -> None:
    """Raise where a model can't be captured."""
    if example is None:
        raise ValueError("cuda_graph=True needs an example of the largest batch to be served; pass example=")
    if example.device.type != "cuda":
        remedy = "move both there" if torch.cuda.is_available() else "torch finds none here"
        where = f"needs the model and the example on a CUDA device, not on {example.device}"
        raise ValueError(f"cuda_graph=True {where}; {remedy}")
    if example.dim() != 4 or not example.shape[0]:
        raise ValueError(f"cuda_graph=True needs an example of (N, C, H, W) with N >= 1, got {tuple(example.shape)}")
    if list(found) != [model]:
        reason = next((line.reason for line in lines if line.reason), "nothing in it is optimized")
        raise ValueError(f"cuda_graph=True captures a network that has one plan, and this one has none: {reason}")


def unoptimize(model: nn.Module) -> None:
    """Give every module that optimize changed its class back, and drop what was packed for it."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"unoptimize takes an nn.Module, got {type(model).__name__}")
    for module in model.modules():
        inference.forget(module)
        swap.unoptimize(module)


class _Walk:
    """Looks at every module from the root down, but not below what is planned as a whole."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        # What is left of a module that holds others (`apart`) has its attributes, and hence its name.
        self._names = {id(vars(module)): name for name, module in model.named_modules()}
        self.found: list[nn.Module] = []
        self.origins: dict[int, tuple[nn.Module, int]] = {}  # by line, the module and the number of its step

    def lines(self) -> Iterator[Line]:
        for number, (line, origin) in enumerate(self._visit(self._model)):
            if origin is not None:
                self.origins[number] = origin
            yield line

    def _visit(self, module: nn.Module, told: bool = False) -> Iterator[tuple[Line, tuple[nn.Module, int] | None]]:
        """The lines of a module and where they come from; `told` says that a line has its reason already."""
        cls = swap.class_of(module)
        if not any(isinstance(child, nn.Conv2d) for child in module.modules()):
            return
        if cls.__module__.startswith("torch.") and not isinstance(module, nn.Sequential):
            return
        reason = _objection(module)
        flat = None if reason is not None else _flat(module)
        if flat is None or not flat.convolutions:
            if flat is not None and isinstance(flat.steps[0].operation, Plain):
                reason = flat.steps[0].operation.reason
            if not told:
                yield Line(self._name(module), "as it is", "plain", reason=reason), None
            if eligibility.barrier(module) is None:
                for child in module.children():
                    yield from self._visit(child)
            return
        self.found.append(module)
        mode = _mode(module)
        for number, step in enumerate(flat.steps):
            operation = step.operation
            backend = backend_of(operation, mode)
            reason = operation.reason if isinstance(operation, Plain) else None
            name = "plain" if backend is None else backend.name
            yield Line(self._name(module), self._step(operation), name, step.in_place, reason), (module, number)
            if isinstance(operation, Plain) and isinstance(operation.target, nn.Module):
                yield from self._visit(operation.target, told=True)

    def _step(self, operation: Operation) -> str:
        """A step in words: the first module's path, and what follows it."""
        if isinstance(operation, Plain):
            target = operation.target
            if isinstance(target, nn.Module):
                return self._name(target)
            called = getattr(target, "target", target)
            return str(getattr(called, "__name__", called))
        if isinstance(operation, Convolve):
            terms = [self._name(operation.conv), *self._last_names(operation.norm)]
            terms += [] if operation.gate is None else ["gate"]
            terms += [] if operation.parts is None else ["add"]
            terms += [] if operation.act is IDENTITY else [operation.act.name]
        elif isinstance(operation, Normalise):
            terms = [self._name(operation.norm), *self._act(operation.act)]
        else:
            terms = [*self._join(operation), "add", *self._act(operation.parts.act)]
        return "+".join(terms)

    def _join(self, operation: Join) -> list[str]:
        modules = [*([] if operation.norm is None else [operation.norm]), *operation.parts.between]
        gate = [] if operation.parts.gate is None else ["gate"]
        return [*map(self._name, modules), *gate]

    def _last_names(self, module: nn.Module | None) -> list[str]:
        return [] if module is None else [self._name(module).rpartition(".")[2]]

    def _name(self, module: nn.Module) -> str:
        return self._names[id(vars(module))]

    def _act(self, act: object) -> list[str]:
        if isinstance(act, nn.Module):
            return self._last_names(act)
        return [] if act is IDENTITY else [getattr(act, "name", "")]


def _objection(module: nn.Module) -> str | None:
    barrier = eligibility.barrier(module)
    if barrier is not None:
        return barrier.reason
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    return swap.objection(swap.class_of(module))


def _mode(module: nn.Module) -> Mode:
    """What a call under the current autocast would run in, on the device where the module is."""
    weight = next(parameter for parameter in module.parameters() if parameter.dim() == 4)
    mode = inference.mode_of(module, weight)
    if isinstance(mode, str):
        raise ValueError(mode)
    return mode


def _flat(module: nn.Module) -> Flat | None:
    if not any(parameter.dim() == 4 for parameter in module.parameters()):
        return None
    return flatten(module, _mode(module))

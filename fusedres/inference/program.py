"""A module's plans for one mode: filters folded and packed once, and for each input's size who computes what where."""

from __future__ import annotations

import math
import threading
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fusedres import dispatch
from fusedres.backends import Backend, Filter, Geometry, Request
from fusedres.inference import arena, calls, choice, folding
from fusedres.inference.arena import Likeness
from fusedres.inference.calls import NHWC, Calls, in_channels_last
from fusedres.inference.choice import Candidate, Choice, Problem
from fusedres.inference.flatten import Flat, flatten
from fusedres.inference.graphs import Graphs, is_by_image
from fusedres.inference.plan import Bound, Changed, Plan, Tape, advance
from fusedres.inference.steps import Convolve, Mode, Operation, Plain, Step, wide_slots
from fusedres.inference.watch import Watch
from fusedres.ops import contract

_MOST_PLANS = 32  # of sizes; the one that was made first goes


class Program:
    """What a module's forward comes to in one mode; a plan is bound while the first input of its sizes passes."""

    def __init__(self, module: nn.Module, mode: Mode, flat: Flat | None = None) -> None:
        self.mode = mode
        self.flat = flatten(module, mode) if flat is None else flat
        self.watch = Watch(module, self.flat.hosts, self.flat.gates)
        weights = [step.operation.conv.weight for step in self.flat.steps if isinstance(step.operation, Convolve)]
        self._writes_channels_last = any(_is_channels_last(weight) for weight in weights)
        self._wide = wide_slots(self.flat.steps, partial(folding.is_connecting, mode=mode))
        self._packed: dict[tuple[int, str], Filter] = {}
        self._plans: dict[torch.Size, Plan] = {}
        self._arenas: list[Arena] = []  # those that no thread uses now
        self._binding = threading.RLock()
        self.graphs: Graphs | None = None

    def bind(self, x: Tensor) -> Any:
        """Make the first plan, and return the result for x."""
        return self._bind(x)

    def capture(self, x: Tensor, largest: int) -> Any:
        """The result for x by a graph; so are later ones for up to `largest` images."""
        self.graphs = Graphs(self, largest, is_by_image(self.flat))
        return self.graphs(x)

    def _bind(self, x: Tensor) -> Any:
        """Make the plan for inputs of x's sizes; returns the result for x."""
        bound, packed = [], len(self._packed)
        values: list[Any] = [in_channels_last(x), *[None] * len(self.flat.steps)]
        with self._binding:
            for step in self.flat.steps:
                given = values[step.source]
                ready, chosen = self._ready(step, given, None if step.residual is None else values[step.residual])
                advance(values, step, ready.run)
                bound.append(Bound(step, ready, chosen, _likeness(given), _likeness(values[step.target])))
            if len(self._packed) > packed:
                settle(x.device)
            while len(self._plans) >= _MOST_PLANS:
                del self._plans[next(iter(self._plans))]
            self._plans[x.shape] = plan = Plan(bound)
        if plan.bytes:
            held = self._take_arena()
            held.tape(plan)
            self._arenas.append(held)
        return self._in_eagers_layout(values[-1], x)

    def __call__(self, x: Tensor) -> Any:
        plan = self._plans.get(x.shape)
        if plan is None:
            return self._bind(x)
        if not plan.bytes:
            return self._in_eagers_layout(plan.run_apart(in_channels_last(x)), x)
        held = self._take_arena()
        try:
            y = held.tape(plan)(in_channels_last(x))
        except Changed:
            y = plan.run_apart(in_channels_last(x))
        finally:
            self._arenas.append(held)
        return self._in_eagers_layout(y, x)

    def _take_arena(self) -> Arena:
        try:
            return self._arenas.pop()
        except IndexError:
            return Arena()

    @property
    def latest(self) -> Plan:
        """The plan that was bound last."""
        return next(reversed(self._plans.values()))

    def _in_eagers_layout(self, y: Any, x: Tensor) -> Any:
        if type(y) is not Tensor or y.dim() != 4:
            return y
        interleaved = self._writes_channels_last or _is_channels_last(x)
        return y.contiguous(memory_format=NHWC if interleaved else torch.contiguous_format)

    def _ready(self, step: Step, x: Tensor, residual: Tensor | None) -> tuple[Calls, Choice | None]:
        operation = step.operation
        if isinstance(operation, Plain) and folding.is_connecting(operation.target, self.mode):
            return self._connect(step, operation.target), None
        if not isinstance(operation, Convolve):
            is_wide = step.target in self._wide
            return calls.of_other(operation, x, self._has_ops, self._serving.convolution, is_wide), None

        def ready(candidate: Candidate, taps: Filter, in_place: bool) -> Calls:
            given = operation, self._cast, in_place, self._has_ops, x, residual
            return calls.of_convolution(candidate.convolution, taps, *given)

        def timed(candidate: Candidate) -> Any:
            made = ready(candidate, self._pack(step, candidate, x, residual), False)
            given = (x,) if residual is None else (x, residual)
            if made.prepare is None or not step.is_private:
                return lambda: made.run(*given)
            y = made.run(*given)  # what the plan has a place for is timed without making it
            added = None if residual is None else in_channels_last(residual)
            return made.prepare(in_channels_last(x, made.dtype), added, y, None)

        problem = Problem(operation.conv.weight.shape, operation.geometry, x.shape)
        chosen = choice.choose(_request(operation, self.mode), problem, x, timed)
        key = step.target, chosen.candidate.name
        if key not in self._packed:
            refuse_capture()
            self._packed[key] = self._pack(step, chosen.candidate, x, residual)
        return ready(chosen.candidate, self._packed[key], step.in_place), chosen

    @property
    def _has_ops(self) -> bool:
        """Whether a backend that was asked for has more than convolutions."""
        return self.mode.forced is None or dispatch.backend(self.mode.forced).computes("affine_act")

    @property
    def _cast(self) -> torch.dtype | None:
        """What operands are cast to."""
        return self.mode.dtype if self.mode.autocast else None

    @property
    def _serving(self) -> Backend:
        """Whom the dispatcher names for a bare convolution."""
        return dispatch.serving(_request_for(self.mode))

    def _connect(self, step: Step, linear: nn.Linear) -> Calls:
        backend = self._serving
        convolution = backend.convolution
        if convolution is None or backend.plain:
            return Calls(linear)
        head = convolution.head if step.source in self._wide else None
        key = step.target, backend.name
        if key not in self._packed:
            refuse_capture()
            taps = folding.filter_of(linear, self.mode.dtype)
            if head is not None:
                self._packed[key] = Filter(taps.weight.flatten(1).contiguous(), taps.bias)
            else:
                self._packed[key] = convolution.pack(taps, Geometry(), (1, linear.in_features, 1, 1), False)
        if head is not None:
            return calls.of_wide_linear(head, self._packed[key], linear, self.mode.dtype)
        return calls.of_linear(convolution, self._packed[key], linear, self._cast)

    def _pack(self, step: Step, candidate: Candidate, x: Tensor, residual: Tensor | None) -> Filter:
        operation = step.operation
        assert isinstance(operation, Convolve)
        apart = candidate.convolution.scales or bool(candidate.backend.plain)
        taps = folding.fold(operation, self.mode.dtype, apart=apart)
        joins = residual is not None and calls.fits(operation, in_channels_last(x, self._cast), residual)
        return candidate.pack(taps, operation.geometry, x.shape, joins)


class Arena:
    """Memory for one call at a time, with the plans that were laid into it."""

    def __init__(self) -> None:
        self._memory = arena.memory(0)
        self._tapes: dict[Plan, Tape] = {}

    def tape(self, plan: Plan) -> Tape:
        found = self._tapes.get(plan)
        if found is None:
            if plan.bytes > self._memory.numel():
                self._tapes.clear()
                self._memory = arena.memory(plan.bytes)
            while len(self._tapes) >= _MOST_PLANS:
                del self._tapes[next(iter(self._tapes))]
            found = self._tapes[plan] = plan.tape(self._memory)
        return found


def settle(device: torch.device) -> None:
    """Let what was packed be there, since other streams read it as soon as the plan is published."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def refuse_capture() -> None:
    """Raise where a CUDA graph is being captured."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "an optimized model has no plan yet for this mode, and weights packed in a CUDA graph's capture would "
            "be its own; call optimize(model, example=x), or the model once, before the capture"
        )


def backend_of(operation: Operation, mode: Mode) -> Backend | None:
    """Whom the dispatcher names for a convolution; None for what is no convolution."""
    return dispatch.serving(_request(operation, mode)) if isinstance(operation, Convolve) else None


def _request(operation: Convolve, mode: Mode) -> Request:
    residual = (mode.dtype, "channels_last") if operation.parts is not None else (None, None)
    return _request_for(mode)._replace(
        act=operation.act.name,
        residual_dtype=residual[0],
        residual_layout=residual[1],
        group=operation.geometry.group(operation.conv.weight.shape),
        window_positions=math.prod(operation.conv.kernel_size),
        geometry=operation.geometry,
        tf32=contract.multiplies_tf32(mode.dtype, mode.device.type),
    )


def _request_for(mode: Mode) -> Request:
    """For a bare convolution."""
    return Request("conv_act", mode.device.type, mode.dtype, "channels_last", "identity", parameter_dtype=mode.dtype)


def _likeness(t: object) -> Likeness | None:
    """Of what may lie in an arena."""
    return Likeness.of(t) if type(t) is Tensor and t.dim() == 4 and t.numel() else None


def _is_channels_last(t: Tensor) -> bool:
    return t.is_contiguous(memory_format=NHWC) and not t.is_contiguous()

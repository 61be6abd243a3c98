"""Plans replayed as CUDA graphs: one for each bucket of batch sizes, captured when an input first falls into it.

A batch is padded to its bucket: the next power of 2, or the largest batch, that of the example. Larger ones run without
a graph. Where a step might let one image see another, padding would change results, so every batch size has a graph of
its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fusedres.epilogue import CATALOGUE, of_module
from fusedres.inference.calls import NHWC
from fusedres.inference.flatten import Flat
from fusedres.inference.steps import Convolve, Join, Normalise, Operation
from fusedres.modules import is_batch_norm, is_hooked, norm_of
from fusedres.swap import Call

Run = Callable[[Tensor], Any]

_MOST_GRAPHS = 32  # the one that was captured first goes
_WARM_UPS = 3
_BY_IMAGE = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Linear, nn.Identity, nn.Dropout)


class Graphs:
    """A network's graphs; one replays at a time, whatever threads and streams call it.

    Args:
        run: computes what is captured.
        largest: the most images a graph is captured for.
        pads: whether batches may be padded.
        capture: (run, an input) -> its graph.
    """

    def __init__(self, run: Run, largest: int, pads: bool, capture: Callable[[Run, Tensor], Run] | None = None) -> None:
        self._run, self._largest, self._pads = run, largest, pads
        self._capture = Captured if capture is None else capture
        self._graphs: dict[tuple[object, ...], Run] = {}
        self._replaying = threading.Lock()

    def __call__(self, x: Tensor) -> Any:
        batch = x.shape[0] if x.dim() == 4 else 0
        if not 0 < batch <= self._largest or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            return self._run(x)
        bucket = min(1 << (batch - 1).bit_length(), self._largest) if self._pads else batch
        order = NHWC if x.is_contiguous(memory_format=NHWC) else torch.contiguous_format
        key = bucket, x.shape[1:], x.dtype, order
        with self._replaying:
            graph = self._graphs.get(key)
            if graph is None:
                graph = self._capture(self._run, _padded(x, bucket, order))
                while len(self._graphs) >= _MOST_GRAPHS:
                    del self._graphs[next(iter(self._graphs))]
                self._graphs[key] = graph
            return graph(x)


def _padded(x: Tensor, batch: int, order: torch.memory_format) -> Tensor:
    """Memory for as many images, which calls in inference mode and outside of it may write to; x lies in it."""
    with torch.inference_mode(False), torch.no_grad():
        padded = torch.zeros((batch, *x.shape[1:]), dtype=x.dtype, device=x.device).contiguous(memory_format=order)
        padded[: x.shape[0]].copy_(x)
    return padded


class Captured:
    """One graph, with the input that it reads and the output that it writes.

    Captured after a few runs on a stream of its own; replayed on the stream that calls it, after the replay before.
    """

    def __init__(self, run: Run, x: Tensor) -> None:
        self._x = x
        with torch.cuda.device(x.device):
            side, current = torch.cuda.Stream(), torch.cuda.current_stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(_WARM_UPS):
                    run(x)
            current.wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):  # others may go on
                self._y = run(x)
            self._done = torch.cuda.Event()
        if not isinstance(self._y, Tensor) or self._y.shape[:1] != x.shape[:1]:
            raise ValueError("cuda_graph=True needs a model that returns one tensor with a row for each image")

    def __call__(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        with torch.cuda.device(x.device):
            self._done.wait()
            self._x[:batch].copy_(x)
            self._graph.replay()
            y = self._y[:batch].clone()
            self._done.record()
        return y


def serve(device: torch.device) -> bool:
    """Whether there are graphs for a device."""
    return device.type == "cuda"


def is_by_image(flat: Flat) -> bool:
    """Whether every step is known to compute each image from that image alone."""
    return all(_is_by_image(step.operation) for step in flat.steps)


def _is_by_image(operation: Operation) -> bool:
    if isinstance(operation, Convolve):
        return True
    if isinstance(operation, Normalise):
        return _is_constant(operation.norm)
    if isinstance(operation, Join):
        return not operation.parts.between and (operation.norm is None or _is_constant(operation.norm))
    target = operation.target
    if isinstance(target, Call):
        return target.target in (torch.flatten, "flatten") and target.arguments[:1] == (1,) and not target.keywords
    if isinstance(target, nn.Module):
        if is_hooked(target):
            return False
        if type(target) is nn.Flatten:
            return target.start_dim >= 1
        return type(target) in _BY_IMAGE or of_module(target) is not None
    return any(target is act.formula for act in CATALOGUE)


def _is_constant(norm: nn.Module) -> bool:
    """Whether it is a norm by running statistics."""
    return is_batch_norm(norm) and not is_hooked(norm) and not norm_of(norm).training

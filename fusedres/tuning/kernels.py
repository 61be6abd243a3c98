"""Tuning the Triton kernels for this GPU: every declared configuration is timed, and the fastest are kept.

It runs only when it is called. Without it, the configurations that counting bytes in flight suggests are used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fusedres.backends import Statistics, Window

if TYPE_CHECKING:
    from fusedres.backends.triton.configurations import Config, Pass

# (C, H, W) of the norms of ResNet-18 and -50; after the first comes a max-pool.
NORMS = tuple(
    (channels, side, side)
    for side, widths in {
        112: (64,),
        56: (64, 128, 256),
        28: (128, 256, 512),
        14: (256, 512, 1024),
        7: (512, 2048),
    }.items()
    for channels in widths
)
BATCH = 256
STEM_WINDOW = Window((3, 3), (2, 2), (1, 1))
Call = Callable[[], object]


def shapes_at(batch: int) -> list[tuple[int, ...]]:
    """(N, C, H, W) of the norms of ResNet-18 and -50, the stem's first."""
    return [(batch, *norm) for norm in NORMS]


def tune_shapes(
    shapes: Sequence[tuple[int, ...]] | None = None,
    *,
    stems: Sequence[tuple[int, ...]] | None = None,
    dtypes: Sequence[torch.dtype] = (torch.bfloat16,),
    memory_format: torch.memory_format = torch.channels_last,
    device: torch.device | str = "cuda",
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Time every configuration of every pass over tensors of these shapes; returns the table's file.

    What is found for a shape is kept before the next one is begun.

    Args:
        shapes: (N, C, H, W), those of ResNet-18 and -50 at batch 256 if None; what is found for one serves others with
            its channels and about its pixels.
        stems: the same, of norms that a 3x3 max-pool of stride 2 follows.
        progress: called with the timings done and the timings in all.
    """
    refuse_capture()
    from fusedres.backends.triton import launch, tuned
    from fusedres.backends.triton.configurations import BLOCK_PASSES, POOL_PASSES
    from fusedres.backends.triton.view import View

    device = torch.device(device)
    usual = shapes_at(BATCH)
    work = [(shape, BLOCK_PASSES, _block_calls) for shape in (usual if shapes is None else shapes)]
    work += [(shape, POOL_PASSES, _stem_calls) for shape in (usual[:1] if stems is None else stems)]
    total = len(dtypes) * sum(len(kind.configs) for _, kinds, _ in work for kind in kinds)
    path, done = tuned.path_of(launch.device_of(device).name), 0
    for (shape, kinds, calls_of), dtype in product(work, dtypes):
        calls, found = calls_of(shape, dtype, memory_format, device), {}
        for kind in kinds:
            times: dict[Config, float] = {}
            for config in kind.configs:
                with launch.forced(kind, config):
                    times[config] = time_ms(calls[kind.name], device)
                done += 1
                if progress is not None:
                    progress(done, total)
            walked = torch.empty(_walked(kind, shape), device="meta").contiguous(memory_format=memory_format)
            found[tuned.key(kind, View.of(walked).merged(), dtype)] = min(times, key=times.__getitem__)
        tuned.save(launch.device_of(device).name, found)
        launch.forget_plans()
    return path


def refuse_capture() -> None:
    """Raise where a CUDA graph is being captured."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("tuning times its launches, which a CUDA graph's capture can't; tune before the capture")


def _walked(kind: Pass, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of what a pass walks."""
    return (*shape[:2], *STEM_WINDOW.output_size(*shape[2:])) if kind.name == "pool_apply" else shape


def time_ms(calls: Sequence[Call], device: torch.device, *, rounds: int = 20) -> float:
    """The median of one call's milliseconds; `calls` are equal but for their buffers, and take turns."""
    for call in calls:
        call()
    samples = []
    for _ in range(rounds):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(device):
            start.record()
            for call in calls:
                call()
            stop.record()
        stop.synchronize()
        samples.append(start.elapsed_time(stop) / len(calls))
    return median(samples)


def _block_calls(
    shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format, device: torch.device
) -> Mapping[str, Sequence[Call]]:
    """By pass: calls of the op that runs it, a block's end in training, over more buffers than the cache holds."""
    sets = max(2, math.ceil(4 * cache_bytes(device) / (3 * math.prod(shape) * dtype.itemsize)))
    pairs = [_forward_and_backward(shape, dtype, memory_format, device) for _ in range(sets)]
    forward, backward = zip(*pairs, strict=True)
    return {"statistics": forward, "apply": forward, "gradient_sums": backward, "gradient_apply": backward}


def _stem_calls(
    shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format, device: torch.device
) -> Mapping[str, Sequence[Call]]:
    """The same of a stem's norm and max-pool."""
    sets = max(2, math.ceil(4 * cache_bytes(device) / (math.prod(shape) * dtype.itemsize)))
    pairs = [_stem_forward_and_backward(shape, dtype, memory_format, device) for _ in range(sets)]
    forward, backward = zip(*pairs, strict=True)
    return {"pool_apply": forward, "pool_gradient_sums": backward, "pool_gradient_apply": backward}


def _forward_and_backward(
    shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format, device: torch.device
) -> tuple[Call, Call]:
    from fusedres.backends.triton.bn_act import bn_act_backward, bn_act_forward

    x, r, dy = (torch.randn(shape, device=device).to(dtype, memory_format=memory_format) for _ in range(3))
    wide = torch.promote_types(dtype, torch.float32)
    weight, bias = (torch.rand(shape[1], device=device, dtype=wide) for _ in range(2))
    # Without running statistics: those that a network has must not move while it is tuned.
    norm, shortcut = (weight, bias, None, None), (None, None, None, None)
    scalars = (Statistics.BATCH.value, Statistics.ABSENT.value, 0.1, 0.1, 1e-5, 1e-5, 1)

    def forward() -> tuple[Tensor, ...]:
        return bn_act_forward(x, *norm, r, *shortcut, None, *scalars, True)

    _, stats, stats_r, mask = forward()
    saved = (None, mask, x, weight, bias, stats, None, None, None, stats_r, None)
    needs = [True, True, True, True, False, False, False]

    def backward() -> tuple[Tensor, ...]:
        return bn_act_backward(dy, *saved, *scalars[:2], 1, needs)

    return forward, backward


def _stem_forward_and_backward(
    shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format, device: torch.device
) -> tuple[Call, Call]:
    from fusedres.backends.triton.bn_act_pool import bn_act_pool_backward, bn_act_pool_forward

    x = torch.randn(shape, device=device).to(dtype, memory_format=memory_format)
    wide = torch.promote_types(dtype, torch.float32)
    weight, bias = (torch.rand(shape[1], device=device, dtype=wide) for _ in range(2))
    source = Statistics.BATCH.value

    def forward() -> tuple[Tensor, ...]:
        return bn_act_pool_forward(x, weight, bias, None, None, source, 0.1, 1e-5, *STEM_WINDOW, 1, True)

    y, stats, choice = forward()
    dy = torch.randn_like(y)

    def backward() -> tuple[Tensor, ...]:
        return bn_act_pool_backward(dy, choice, x, weight, stats, source, *STEM_WINDOW, [True] * 3)

    return forward, backward


def cache_bytes(device: torch.device) -> int:
    """Of the cache that all processors share."""
    return torch.cuda.get_device_properties(device).L2_cache_size

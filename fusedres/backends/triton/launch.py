"""What every launch has in common: the device, the configuration, the kernel's operands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from fusedres.backends.triton import tuned
from fusedres.backends.triton.configurations import Config, Pass, blocks, default
from fusedres.backends.triton.view import View

CHANNELS_FINISHED = 8  # by a program: 32 bytes of fp32, what memory hands out at a time
PARTS_AT_ONCE = 256


class Operand(NamedTuple):
    """A tensor and its per-channel map, as the kernels take them.

    centre: (C,) means, or where `norm` the (3, C) statistics.
    """

    data: Tensor | None
    centre: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    norm: bool

    @staticmethod
    def of_norm(data: Tensor | None, weight: Tensor | None, bias: Tensor | None, stats: Tensor) -> Operand:
        if not stats.numel():
            return Operand(data, None, None, None, False)
        return Operand(data, stats, weight, bias, True)


class Device(NamedTuple):
    """What a configuration depends on."""

    name: str
    capability: int
    processors: int


@cache
def device_of(device: torch.device) -> Device:
    facts = torch.cuda.get_device_properties(device)
    return Device(facts.name, 10 * facts.major + facts.minor, facts.multi_processor_count)


_forced: dict[str, Config] = {}  # by the pass's name


@contextmanager
def forced(kind: Pass, config: Config) -> Iterator[None]:
    """Run a pass in this configuration: for tuning, and for tests."""
    _forced[kind.name] = config
    try:
        yield
    finally:
        del _forced[kind.name]


def chosen(kind: Pass, view: View, dtype: torch.dtype, device: Device) -> Config:
    """The forced configuration, else the tuned one, else the default."""
    if kind.name in _forced:
        return _forced[kind.name]
    found = tuned.find(device.name, tuned.key(kind, view, dtype))
    return default(kind, device.capability, dtype.itemsize) if found is None else found


class Plan(NamedTuple):
    """One pass over a tensor: its blocks and its programs."""

    config: Config
    constants: dict[str, Any]
    tiles: int
    channel_blocks: int
    resident: int  # programs that the device holds at a time

    @staticmethod
    def of(kind: Pass, view: View, t: Tensor) -> Plan:
        device = device_of(t.device)
        config = chosen(kind, view, t.dtype, device)
        block = blocks(config, view, t.dtype)
        constants = {
            "CHANNELS_LAST": view.channels_last,
            "ACC": tl.float64 if t.dtype == torch.float64 else tl.float32,
            "UNROLL": config.unroll,
            **block,
        }
        return Plan(
            config,
            constants,
            view.images * ceil_div(view.pixels, block["BLOCK_P"]),
            ceil_div(view.channels, block["BLOCK_C"]),
            config.programs * device.processors,
        )

    def parts(self, tiles: int, groups: int) -> int:
        """Into how many parts a reduction cuts each of `groups` times `tiles` tiles: one wave of programs."""
        return min(tiles, max(1, self.resident // (groups * self.channel_blocks)))

    def run(self, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        launch(kernel, (programs * self.channel_blocks,), arguments, {**self.constants, **constants}, self.config.warps)

    def run_elementwise(self, kernel: Any, *arguments: Any, **constants: Any) -> None:
        self.run(kernel, ceil_div(self.tiles, self.config.unroll), *arguments, **constants)


def finish(kernel: Any, groups: int, channels: int, *arguments: Any, **constants: Any) -> None:
    """Run a kernel that merges parts, channel by channel."""
    grid = (groups, ceil_div(channels, CHANNELS_FINISHED))
    constants |= {"BLOCK_PARTS": PARTS_AT_ONCE, "BLOCK_C": CHANNELS_FINISHED}
    launch(kernel, grid, arguments, constants, 8)


def launch(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any], warps: int
) -> None:
    """On the current stream of the current device."""
    kernel[grid](*arguments, **constants, num_warps=warps)


def gate_strides(gate: Tensor | None) -> tuple[int, int]:
    """A gate's steps from image to image and from channel to channel; 0 where it has one value for all."""
    if gate is None:
        return 0, 0
    image, channel = (gate.stride(d) if gate.shape[d] > 1 else 0 for d in (0, 1))
    return image, channel


def per_image(gate: Tensor | None) -> bool:
    return gate is not None and gate.shape[0] > 1


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)

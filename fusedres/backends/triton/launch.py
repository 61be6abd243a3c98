"""What every launch has in common: the device, the configuration, the grid."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from fusedres.backends.triton import blocking, tuned
from fusedres.backends.triton.arguments import Cut
from fusedres.backends.triton.blocking import Blocks, Problem, Product
from fusedres.backends.triton.configurations import Config, Pass, blocks, default
from fusedres.backends.triton.view import View

CHANNELS_FINISHED = 8  # by a program: 32 bytes of fp32, what memory hands out at a time
PARTS_AT_ONCE = 256


class Device(NamedTuple):
    """What a configuration depends on."""

    name: str
    capability: int
    processors: int


@cache
def device_of(device: torch.device) -> Device:
    facts = torch.cuda.get_device_properties(device)
    return Device(facts.name, 10 * facts.major + facts.minor, facts.multi_processor_count)


_forced: dict[str, Any] = {}  # by the name of the pass or product


@contextmanager
def forced(kind: Pass | Product, config: Config | Blocks) -> Iterator[None]:
    """Run a pass or a product in this configuration: for tuning, and for tests."""
    _forced[kind.name] = config
    try:
        yield
    finally:
        del _forced[kind.name]


def chosen(kind: Pass, view: View, dtype: torch.dtype, device: Device) -> Config:
    """The forced configuration, else the tuned one, else the default."""
    if kind.name in _forced:
        return _forced[kind.name]
    found: Any = tuned.find(device.name, tuned.key(kind, view, dtype))
    return default(kind, device.capability, dtype.itemsize) if found is None else found


def blocks_of(kind: Product, problem: Problem, device: Device) -> Blocks:
    """The same of a product: worked out at the first call for such a problem, and remembered."""
    return _forced[kind.name] if kind.name in _forced else _blocks(kind, problem, device)


@lru_cache(maxsize=4096)
def _blocks(kind: Product, problem: Problem, device: Device) -> Blocks:
    found: Any = tuned.find(device.name, kind.entry(problem))
    return blocking.default(kind, problem, device.capability, device.processors) if found is None else found


class Plan(NamedTuple):
    """One pass over a tensor: its blocks and its programs."""

    config: Config
    cut: Cut
    tiles: int
    channel_blocks: int
    resident: int  # programs that the device holds at a time

    @staticmethod
    def of(kind: Pass, view: View, t: Tensor) -> Plan:
        """Worked out at the first call for such a tensor, and remembered; a forced one is not."""
        work_out = _plan.__wrapped__ if _forced else _plan
        return work_out(kind, view, t.dtype, device_of(t.device))

    def parts(self, tiles: int, groups: int) -> int:
        """Into how many parts a reduction cuts each of `groups` times `tiles` tiles: one wave of programs."""
        return min(tiles, max(1, self.resident // (groups * self.channel_blocks)))

    def run(self, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        launch(kernel, (programs * self.channel_blocks,), arguments, {**constants, "CUT": self.cut}, self.config.warps)

    def run_elementwise(self, kernel: Any, *arguments: Any, **constants: Any) -> None:
        self.run(kernel, ceil_div(self.tiles, self.config.unroll), *arguments, **constants)


@lru_cache(maxsize=4096)
def _plan(kind: Pass, view: View, dtype: torch.dtype, device: Device) -> Plan:
    config = chosen(kind, view, dtype, device)
    block_p, block_c = blocks(kind, config, view, dtype)
    acc = tl.float64 if dtype == torch.float64 else tl.float32
    cut = Cut(*map(tl.constexpr, (view.channels_last, acc, block_p, block_c, config.unroll, view.row_factor())))
    tiles, channel_blocks = view.images * ceil_div(view.pixels, block_p), ceil_div(view.channels, block_c)
    return Plan(config, cut, tiles, channel_blocks, config.programs * device.processors)


def forget_plans() -> None:
    """For whoever changes what is chosen."""
    _plan.cache_clear()
    _blocks.cache_clear()


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


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)

"""Triton's compiler without a GPU: launches that are compiled instead of run, and what their machine code takes."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fusedres.backends.triton import launch
from fusedres.backends.triton.configurations import ARCHITECTURES

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
CAPABILITIES = tuple(ARCHITECTURES)
AMD = ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201")
REGISTERS = 65536  # of a processor


class Driver:
    """A driver without a device: it names the target, which is all that compiling asks."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_device(self) -> int:
        return self.target.arch if isinstance(self.target.arch, int) else AMD.index(self.target.arch)

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


@dataclass(frozen=True)
class Usage:
    """What one kernel's machine code takes."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    wide_loads: int  # of 128 bits, from global memory
    loads: int
    wide_stores: int
    stores: int
    single: int  # accesses to one 16-bit element
    atomics: int  # to memory of any kind

    def resident(self, warps: int, capability: int) -> int:
        """Programs that a processor's registers, which come in eights, and its shared memory allow."""
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * 32 * warps)
        return min(by_registers, ARCHITECTURES[capability].shared_kib * 1024 // (self.shared_bytes + 1024))


@contextmanager
def compiling(target: GPUTarget, capability: int, found: Callable[[Any, Any, int], None]) -> Iterator[None]:
    """Launches are compiled for `target` and not run: `found(kernel, machine code, warps)`."""

    def compile_only(kernel: Any, grid: Any, arguments: Any, constants: dict[str, Any], warps: int) -> None:
        found(kernel, kernel.warmup(*arguments, grid=grid, **constants, num_warps=warps), warps)

    previous = launch.launch, launch.device_of
    launch.launch = compile_only
    launch.device_of = lambda device: launch.Device("", capability, ARCHITECTURES[capability].processors)
    driver.set_active(Driver(target))
    try:
        yield
    finally:
        launch.launch, launch.device_of = previous
        if torch.cuda.is_available():
            driver.reset_active()


@cache
def usage(cubin: bytes) -> Usage:
    resources, code = _told_by("cuobjdump", "-res-usage", cubin), machine_code(cubin)
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", resources)}
    loads, stores = (re.findall(rf"\b{op}\.E\S*", code) for op in ("LDG", "STG"))
    wide_loads, wide_stores = (sum(".128" in name for name in names) for names in (loads, stores))
    spilled, single = numbers["STACK"] + numbers["LOCAL"], sum(".U16" in name for name in loads + stores)
    atomics = len(re.findall(r"\b(?:ATOM|ATOMG|ATOMS|RED|REDG|REDAS)\b", code))
    counts = wide_loads, len(loads), wide_stores, len(stores), single, atomics
    return Usage(numbers["REG"], spilled, numbers["SHARED"], *counts)


@cache
def machine_code(cubin: bytes) -> str:
    """Its instructions, disassembled."""
    return _told_by("nvdisasm", "-c", cubin)


def _told_by(tool: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / tool), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""Write docs/compiled.md: what Triton's compiler makes of every kernel for every architecture, without a GPU.

python benchmarks/compiled.py docs/compiled.md
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import compiled_products
import torch
import triton
from _compiling import AMD, CAPABILITIES, Usage, compiling, name_of, usage
from triton.backends.compiler import GPUTarget

from fusedres.backends import Window
from fusedres.backends.triton import affine_act, bn_act, bn_act_pool, configurations

STEM_WINDOW = Window((3, 3), (2, 2), (1, 1))


@dataclass(frozen=True)
class Form:
    """One call of an op, by what changes the code of its kernels."""

    name: str
    op: str = "bn_act"
    shape: tuple[int, ...] = (256, 256, 56, 56)
    channels_last: bool = True
    residual: str = "none"  # "plain", "projection"
    act: int = 1
    source: int = 1
    gate: tuple[int, int] | None = None  # whether it differs between images, between channels
    window: Window = STEM_WINDOW  # of bn_act_pool

    @property
    def aligned(self) -> bool:
        """Whether rows are whole vectors of 16-bit elements."""
        return (self.shape[1] if self.channels_last else math.prod(self.shape[2:])) % 8 == 0

    @property
    def pools(self) -> bool:
        return self.op == "bn_act_pool"

    @property
    def keeps_mask(self) -> bool:
        return self.act == 1 and self.residual != "none"


INTERIOR = Form("interior")
BLOCK_END = Form("block end", residual="plain")
PROJECTION = Form("projection", residual="projection")
STEM = Form("stem", op="bn_act_pool", shape=(256, 64, 112, 112))
FORMS = (
    INTERIOR,
    BLOCK_END,
    PROJECTION,
    Form("contiguous", residual="projection", channels_last=False),
    Form("eval", source=2, residual="plain"),
    Form("gate", residual="plain", gate=(1, 1)),
    Form("silu", act=4, residual="plain"),
    Form("gelu", act=5),
    Form("affine", op="affine_act", residual="plain"),
    STEM,
    Form("contiguous stem", op="bn_act_pool", shape=(256, 64, 112, 112), channels_last=False),
    Form("eval stem", op="bn_act_pool", shape=(256, 64, 112, 112), source=2),
    Form("stem of large windows", op="bn_act_pool", shape=(8, 64, 56, 56), window=Window((15, 17), (1, 1), (3, 8))),
    Form("rows of 8", shape=(8, 24, 9, 9), residual="projection"),
    Form("planes of 14 x 14", shape=(256, 1024, 14, 14), residual="plain", channels_last=False),
    Form("odd channels", shape=(8, 35, 9, 9), residual="projection"),
    Form("odd planes", shape=(8, 35, 9, 9), residual="projection", channels_last=False),
)
SMALL = (  # Triton takes an integer that is 1 for a constant
    Form("one channel", shape=(4, 1, 5, 5), residual="projection", channels_last=False, gate=(0, 0)),
    Form("one pixel", shape=(6, 8, 1, 1), residual="plain", channels_last=False, gate=(1, 0)),
    Form("one tile", shape=(2, 3, 7, 5), residual="projection", gate=(0, 1)),
    Form("one image", shape=(1, 16, 2, 2), act=4),
)
TRAINED = (INTERIOR, BLOCK_END, PROJECTION, STEM)


@dataclass(frozen=True)
class Compiled:
    """One kernel as one form of one architecture launches it."""

    kernel: str
    form: Form
    dtype: torch.dtype
    capability: int
    warps: int
    planned: int  # programs that the configuration means a processor to hold; 0 where it means none
    usage: Usage

    def resident(self) -> int:
        """Programs that a processor holds."""
        return self.usage.resident(self.warps, self.capability)


def call(form: Form, dtype: torch.dtype) -> None:
    """The form's forward and backward on tensors without memory, which read as aligned."""
    n, c, *_ = form.shape
    wide = torch.promote_types(dtype, torch.float32)
    memory_format = torch.channels_last if form.channels_last else torch.contiguous_format

    def tensor() -> torch.Tensor:
        return torch.empty(form.shape, dtype=dtype, device="meta").contiguous(memory_format=memory_format)

    def channels(count: int) -> list[torch.Tensor]:
        return [torch.empty(c, dtype=wide, device="meta") for _ in range(count)]

    x, dy = tensor(), tensor()
    r = None if form.residual == "none" else tensor()
    projects = form.residual == "projection"
    gate = None
    if form.gate is not None:
        gate = torch.empty((n if form.gate[0] else 1, c if form.gate[1] else 1, 1, 1), dtype=dtype, device="meta")
    if form.pools:
        branch, window = channels(4), form.window
        y, stats, choice = bn_act_pool.bn_act_pool_forward(x, *branch, form.source, 0.1, 1e-5, *window, form.act, True)
        saved = torch.empty_like(y), choice, x, branch[0], stats
        bn_act_pool.bn_act_pool_backward(*saved, form.source, *window, [True] * 3)
        return
    smooth = form.act > 3
    needs = [True] * 3 + [r is not None] + [projects] * 2 + [gate is not None]
    if form.op == "affine_act":
        branch, shortcut = channels(3), channels(3) if projects else [None] * 3
        y, mask = affine_act.affine_act_forward(x, *branch, r, *shortcut, gate, form.act, form.keeps_mask)
        slope = (None if smooth or form.keeps_mask else y), (mask if form.keeps_mask else None)
        affine_act.affine_act_backward(dy, *slope, x, *branch, r, *shortcut, gate, form.act, needs)
        return
    branch, shortcut = channels(4), channels(4) if projects else [None] * 4
    sources = form.source, form.source if projects else 0
    y, stats, stats_r, mask = bn_act.bn_act_forward(
        x, *branch, r, *shortcut, gate, *sources, 0.1, 0.1, 1e-5, 1e-5, form.act, form.keeps_mask
    )
    slope = (None if smooth or form.keeps_mask else y), (mask if form.keeps_mask else None)
    saved = x, *branch[:2], stats, r if projects or smooth else None, *shortcut[:2], stats_r, gate
    bn_act.bn_act_backward(dy, *slope, *saved, *sources, form.act, needs)


def compiled(form: Form, dtype: torch.dtype, capability: int) -> list[Compiled]:
    """Every kernel that the form launches, in order, those of equal code once."""
    rows: dict[bytes, Compiled] = {}
    passes = {kind.name: kind for kind in configurations.PASSES}
    pooled = "pool_" if form.pools else ""

    def found(kernel: Any, code: Any, warps: int) -> None:
        name = kernel.__name__.removesuffix("_parts")
        kind = passes.get(pooled + name, passes.get(name))
        planned = 0 if kind is None else configurations.default(kind, capability, dtype.itemsize).programs
        cubin = code.asm["cubin"]
        rows[cubin] = Compiled(kernel.__name__, form, dtype, capability, warps, planned, usage(cubin))

    with compiling(GPUTarget("cuda", capability, 32), capability, found):
        call(form, dtype)
    return list(rows.values())


def compiled_for_amd(form: Form, dtype: torch.dtype, target: str) -> int:
    """How many launches compile for an AMD target."""
    binaries: list[bytes] = []
    warp = 32 if target.startswith("gfx1") else 64
    with compiling(GPUTarget("hip", target, warp), 90, lambda kernel, code, warps: binaries.append(code.asm["hsaco"])):
        call(form, dtype)
    return len(binaries)


def matrix() -> Iterator[tuple[Form, torch.dtype, int]]:
    """What is compiled: bf16's training forms everywhere, everything else for sm_90."""
    bf16 = torch.bfloat16
    yield from ((form, bf16, capability) for form, capability in itertools.product(TRAINED, CAPABILITIES))
    yield from ((form, bf16, 90) for form in FORMS if form not in TRAINED)
    yield from ((form, bf16, 90) for form in SMALL)
    dtypes = torch.float32, torch.float16, torch.float64
    yield from ((form, dtype, 90) for form, dtype in itertools.product((PROJECTION, STEM), dtypes))


def table(form: Form, dtype: torch.dtype, rows: list[Compiled]) -> Iterator[str]:
    yield from ("", f"## {form.name}, {name_of(dtype)}", "")
    columns = (
        "kernel",
        "target",
        "warps",
        "registers",
        "spilled",
        "shared",
        "programs",
        "128-bit loads",
        "128-bit stores",
        "16-bit accesses",
    )
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for row in rows:
        used = row.usage
        programs = f"{row.resident()} / {row.planned or '-'}"
        memory = f"{used.wide_loads} of {used.loads} | {used.wide_stores} of {used.stores} | {used.single}"
        yield (
            f"| {row.kernel} | sm_{row.capability} | {row.warps} | {used.registers} | {used.spilled_bytes} | "
            f"{used.shared_bytes} | {programs} | {memory} |"
        )


def document() -> Iterator[str]:
    yield "# Compiled kernels"
    yield ""
    yield (
        f"Generated by `make compiled` with Triton {triton.__version__}: what its compiler makes of every kernel of "
        "the Triton backend, for tensors whose pointers are aligned. Nothing here was timed. Programs are those that a "
        "processor's registers and shared memory hold, and those that the configuration counts on. Loads and stores "
        "are instructions on global memory, the wide ones of 128 bits: all on tensors whose rows are whole vectors; "
        "masks, a pool's choices, partial sums and what is per channel may be narrower."
    )
    groups: dict[tuple[Form, torch.dtype], list[Compiled]] = {}
    for form, dtype, capability in matrix():
        groups.setdefault((form, dtype), []).extend(compiled(form, dtype, capability))
    for (form, dtype), rows in groups.items():
        yield from table(form, dtype, rows)
    yield from compiled_products.document()
    yield from ("", "## AMD", "", "Compiled, never run: the backend objects to these devices.", "")
    yield "| target | kernels of a block's end | of a stem |"
    yield "|---|---|---|"
    for target in AMD:
        end, stem = (compiled_for_amd(form, torch.bfloat16, target) for form in (BLOCK_END, STEM))
        yield f"| {target} | {end} | {stem} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.parse_args().out.write_text("\n".join(document()) + "\n")


if __name__ == "__main__":
    main()

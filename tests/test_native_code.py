"""The machine code of the compiled kernels: every variant keeps its instructions to itself, and large outputs bypass
the caches."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Mapping

import pytest

from fusedres import build
from fusedres.build import Library
from fusedres.native_sources import NATIVE, VARIANTS

pytestmark = [
    pytest.mark.usefixtures("native"),
    pytest.mark.skipif(shutil.which("objdump") is None, reason="reads machine code: needs objdump"),
    pytest.mark.skipif("avx2" not in VARIANTS, reason="x86-64 alone has these variants"),
]

# What an instruction needs beside SSE2, by a pattern of it, and the variants that may ask for it.
WIDE = {"avx2", "avx512", "avx512_widened", "avx512_bf16", "amx"}
LIMITED = {
    "AVX": (r"^v", WIDE),
    "fused multiply-add": (r"^vf\w*m(add|sub)", WIDE),
    "AVX-512": (r"%zmm|%k\d|%[xy]mm(1[6-9]|2\d|3[01])", WIDE - {"avx2"}),
    "bfloat16": (r"^v\w*bf16", WIDE - {"avx2", "avx512"}),
    "products of bfloat16": (r"^vdp\w*bf16", {"avx512_bf16"}),
    "tiles": (r"^(tile|tdp|ldtile|sttile)", {"amx"}),
}
STREAMS = re.compile(r"^vmovnt")


@pytest.fixture(scope="module")
def instructions() -> Mapping[str, set[str]]:
    """By variant, "" for what is none's, the instructions of all its functions, each once."""
    found = build.library(NATIVE)
    assert isinstance(found, Library)
    command = ("objdump", "-d", "-C", "--no-show-raw-insn", str(found.path))
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    by_variant: dict[str, set[str]] = defaultdict(set)
    instructions = by_variant[""]
    for line in lines:
        if line.endswith(">:"):
            # objdump leaves some names of lambdas in lambdas as they are.
            names = [
                name for name in VARIANTS if f"fusedres::{name}::" in line or f"8fusedres{len(name)}{name}" in line
            ]
            assert len(names) < 2, f"of two variants: {line}"
            instructions = by_variant["".join(names)]
        elif "\t" in line:
            instructions.add(line.rpartition("\t")[2])
    return by_variant


@pytest.mark.parametrize("extension", LIMITED)
def test_an_instruction_is_found_in_the_variants_that_ask_for_it_and_nowhere_else(
    extension: str, instructions: Mapping[str, set[str]]
) -> None:
    """A template that two of them share would be linked once, from whichever came first."""
    pattern, allowed = LIMITED[extension]
    assert {name for name, found in instructions.items() if any(re.search(pattern, i) for i in found)} == allowed


@pytest.mark.parametrize("variant", ["avx2", "avx512", "avx512_bf16"])
def test_large_outputs_bypass_the_caches(variant: str, instructions: Mapping[str, set[str]]) -> None:
    assert any(map(STREAMS.match, instructions[variant]))

"""The facts of the compiled libraries, and their absence."""

from __future__ import annotations

import os
from pathlib import Path

import emulation_target
import optional
import pytest
import torch

from fusedres import build, host


@pytest.mark.usefixtures("native")
def test_the_cpu_librarys_variants_and_which_are_in_use() -> None:
    optional.package("pybind11")
    facts = host.facts()["cpu"]
    assert facts is not None and facts["variants"]["portable"] is True
    for dtype in ("float32", "bfloat16"):
        assert facts["variants"][facts[dtype]]
    capability = torch.backends.cpu.get_cpu_capability()
    if capability.startswith("AVX") and not os.environ.get("FUSEDRES_CPU_ISA"):
        assert facts["variants"]["avx2"] and facts["float32"] != "portable"


@pytest.mark.usefixtures("native")
def test_the_kernels_facts_are_those_of_the_device() -> None:
    optional.package("pybind11")
    module = host._module()
    found = build.library(emulation_target.target())
    assert module is not None and isinstance(found, build.Library)
    kernels = {kernel["name"]: kernel for kernel in module.cuda_kernels(str(found.path))}
    assert len(kernels) == 8
    # Of 99 KB a block the head takes 4.5; a step of 64 threads takes 1 KB a tensor, and they come by four.
    assert kernels["forward bfloat16"]["on_chip_bytes"] == 3 * 92 << 10
    assert kernels["backward bfloat16"]["on_chip_bytes"] == 3 * 46 << 10
    assert kernels["forward bfloat16"]["blocks_per_multiprocessor"] == 1


def test_without_pybind11_the_facts_are_none(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setattr(host, "find_spec", lambda name: None)
    assert host.facts() == {"cpu": None, "cuda": None}
    found = build.library(host.HOST)
    assert isinstance(found, build.Unavailable) and "pybind11 is not installed" in found.reason


@pytest.mark.usefixtures("native")
def test_of_a_bad_isa_no_variant_is_in_use(run_python) -> None:
    optional.package("pybind11")
    code = "from fusedres import host; found = host.facts()['cpu']; print(found['float32'], *found['variants'])"
    assert run_python(code, FUSEDRES_CPU_ISA="sse9").stdout.startswith("None portable")

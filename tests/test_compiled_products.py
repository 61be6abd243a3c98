"""What Triton's compiler makes of the 1x1 convolutions' kernel, for every architecture, without a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import compiled_products
from compiled_products import BY_POINTERS, SMALL, Convolution, defaults, matrix

from fusedres.backends.triton.blocking import Blocks
from fusedres.backends.triton.configurations import ARCHITECTURES

MULTIPLY = {90: "wgmma", 100: "tcgen05"}
OF_CHANNELS = 32  # narrow loads at most of a scale and a bias


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Compiled afresh, once a test process."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))


@pytest.mark.parametrize(
    "convolution, dtype, capability, blocks",
    [pytest.param(*row, id=f"{row[0].name}-{row[1]}-sm_{row[2]}-{row[3]}") for row in matrix()],
)
def test_nothing_spills_and_the_planned_programs_fit(
    convolution: Convolution, dtype: torch.dtype, capability: int, blocks: Blocks
) -> None:
    row = compiled_products.compiled(convolution, dtype, capability, blocks)
    used = row.usage
    assert used.spilled_bytes == 0
    assert used.shared_bytes <= blocks.shared_bytes(dtype.itemsize) + 64  # barriers
    assert used.shared_bytes <= (ARCHITECTURES[capability].shared_kib - 1) * 1024
    assert row.multiplies[0] == ("fma" if dtype is torch.float32 else MULTIPLY.get(capability, "mma"))
    if convolution in SMALL:
        return
    assert row.resident() >= row.planned >= 1
    assert row.asynchronous > 0
    assert used.loads - used.wide_loads <= OF_CHANNELS and used.wide_loads > 0
    assert used.stores == used.wide_stores > 0


def test_rows_that_are_not_aligned_have_no_wide_access() -> None:
    """Else the counts above could not fail."""
    row = compiled_products.compiled(SMALL[0], torch.bfloat16, 90, BY_POINTERS[-1])
    assert row.asynchronous == row.usage.wide_stores == 0


def test_every_architecture_has_its_defaults_and_the_newer_ones_descriptors() -> None:
    assert {row[2] for row in matrix()} == set(ARCHITECTURES)
    for capability in ARCHITECTURES:
        assert any(blocks.descriptors for _, blocks in defaults(capability)) == (capability >= 90)

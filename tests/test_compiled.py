"""What Triton's compiler makes of the kernels, for every architecture, without a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import compiled
import triton
import triton.language as tl
from compiled import (
    AMD,
    BLOCK_END,
    FORMS,
    PROJECTION,
    SMALL,
    STEM,
    STEM_WINDOW,
    TRAINED,
    Form,
    compiled_for_amd,
    matrix,
    name_of,
)
from triton.backends.compiler import GPUTarget

from fusedres.backends.triton import launch

PAGE = (Path(__file__).parents[1] / "docs" / "compiled.md").read_text()


def narrow(form: Form) -> int:
    """Accesses that a kernel may have to what is narrower than an operand: masks, statistics, a pool's choices."""
    of_choices = 8 if form.window == STEM_WINDOW else 16
    return 4 * form.keeps_mask + 4 * (form.source == 2) + of_choices * form.pools


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    """Compiled afresh, once a test process."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))


@pytest.mark.parametrize(
    "form, dtype, capability",
    [pytest.param(*row, id=f"{row[0].name}-{name_of(row[1])}-sm_{row[2]}") for row in matrix()],
)
def test_nothing_spills_and_the_planned_programs_fit(form: Form, dtype: torch.dtype, capability: int) -> None:
    rows = compiled.compiled(form, dtype, capability)
    if f"Triton {triton.__version__}:" in PAGE:
        assert set(compiled.table(form, dtype, rows)) <= set(PAGE.splitlines()), "run `make compiled`"
    forward = "pool_apply" if form.pools else "apply"
    assert {row.kernel for row in rows} >= {"gradient_sums", "gradient_finish", "gradient_apply", forward}
    for row in rows:
        assert row.usage.spilled_bytes == row.usage.atomics == 0, row
        assert row.resident() >= row.planned, row
        if form in SMALL:
            continue
        if row.planned and form.channels_last and form.aligned:
            assert row.usage.loads - row.usage.wide_loads <= narrow(form), row
            if "apply" in row.kernel:
                assert row.usage.stores - row.usage.wide_stores <= narrow(form), row
        if "apply" in row.kernel and form.aligned and (form.channels_last or not form.pools):
            assert row.usage.wide_stores > 0, row


@triton.jit
def adds_up(x_ptr, sum_ptr, BLOCK: tl.constexpr):
    tl.atomic_add(sum_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, BLOCK)), axis=0))


def test_an_atomic_is_seen() -> None:
    """Else the count above could not fail."""
    found = []
    x = torch.empty(1024, device="meta")
    with compiled.compiling(GPUTarget("cuda", 90, 32), 90, lambda kernel, code, warps: found.append(code.asm["cubin"])):
        launch.launch(adds_up, (1,), (x, x), {"BLOCK": 1024}, 4)
    assert compiled.usage(found[0]).atomics > 0


def test_rows_that_are_not_aligned_have_no_wide_access() -> None:
    """Else the counts above could not fail."""
    odd = next(form for form in FORMS if not form.aligned and form.channels_last)
    rows = compiled.compiled(odd, torch.bfloat16, 90)
    assert rows and not any(row.usage.wide_loads + row.usage.wide_stores for row in rows)


def test_rows_that_4_divides_are_gone_through_in_vectors() -> None:
    planes = {form.name: form for form in FORMS if not form.channels_last}
    found = {name: compiled.compiled(planes[name], torch.bfloat16, 90) for name in ("planes of 14 x 14", "odd planes")}
    single = {name: [row.usage.single for row in rows if row.planned] for name, rows in found.items()}
    assert max(single["planes of 14 x 14"]) <= 2  # the pivots of statistics
    assert min(single["odd planes"]) > 8


@pytest.mark.parametrize("target", AMD)
def test_the_kernels_compile_for_amd(target: str) -> None:
    for form in (BLOCK_END, STEM):
        assert compiled_for_amd(form, torch.bfloat16, target) == 6


def test_the_matrix_has_every_architecture_form_and_dtype() -> None:
    rows = list(matrix())
    assert {(form, capability) for form, _, capability in rows} >= {(form, 90) for form in FORMS}
    assert {row[2] for row in rows if row[0] in TRAINED} == {80, 86, 89, 90, 100, 120}
    dtypes = {torch.float32, torch.float64, torch.bfloat16, torch.float16}
    for case in (PROJECTION, STEM):
        assert {dtype for form, dtype, _ in rows if form is case} == dtypes

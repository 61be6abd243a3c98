"""The shared cases on every backend: each quantity no further from fp64 than eager's, pooled and alone."""

from __future__ import annotations

import pytest
import python_backend
import torch

from fusedres import numerics, testing
from fusedres.backends import Statistics, Window

CASES = testing.cases(2000)
POOL_CASES = testing.pool_cases(2000)


@pytest.mark.parametrize("op", ["bn_act", "affine_act", "bn_act_pool"])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_errors_stay_within_the_bar(fused_backend: str, op: str, dtype: torch.dtype, device: str) -> None:
    cases = [*CASES, *POOL_CASES]
    rows = [row for case in cases if (case.op, case.dtype) == (op, dtype) for row in numerics.compare(case, device)]
    alone = [row for row in rows if row.fails_alone()]
    pooled = [pool for pool in numerics.pools(rows) if pool.fails()]
    assert len(rows) > 600
    assert not alone, "\n".join(map(str, alone[:5]))
    assert not pooled, "\n".join(map(str, pooled[:5]))


def test_the_cases_cover_every_group_and_every_choice() -> None:
    groups = len(testing.DTYPES) * len(testing.LAYOUTS) * len(testing.VALUES)
    assert len({case.group() for case in POOL_CASES}) == groups * 2
    assert {case.window for case in POOL_CASES} == {Window(*w) for w in testing.WINDOWS}
    assert len({case.group() for case in CASES}) == groups * 3
    for field, choices in (("residual", testing.RESIDUALS), ("gate", testing.GATES)):
        assert {getattr(case, field) for case in CASES} == set(choices)
    assert sum(case.shape in testing.LARGE_SHAPES for case in CASES) == 12


def _sum_of_squares(x, running_mean, running_var, source, momentum, eps):
    """Statistics as no backend may take them: E[x^2] - E[x]^2 in fp32."""
    if source != Statistics.BATCH:
        return _exact_statistics(x, running_mean, running_var, source, momentum, eps)
    wide = x.float()
    count = x.numel() // x.shape[1]
    mean = python_backend.channel_sum(wide) / count
    var = (python_backend.channel_sum(wide * wide) / count - mean * mean).clamp(min=0)
    return torch.stack([mean, torch.zeros_like(mean), (var + eps).rsqrt()])


def _rounded_mean(x, running_mean, running_var, source, momentum, eps):
    """Statistics without the low part of the mean."""
    stats = _exact_statistics(x, running_mean, running_var, source, momentum, eps)
    return torch.stack([stats[0], torch.zeros_like(stats[1]), stats[2]]) if stats.numel() else stats


_exact_statistics = python_backend.batch_statistics


@pytest.mark.parametrize("statistics", [_sum_of_squares, _rounded_mean], ids=lambda f: f.__name__)
def test_the_bar_catches_poor_statistics(statistics, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python_backend, "batch_statistics", statistics)
    with python_backend.registered():
        chosen = [
            case
            for case in testing.cases(1200, large=0)
            if case.op == "bn_act" and case.mode == "training" and case.dtype == torch.float32
            and case.values == "mean1e4" and case.layout == "contiguous" and case.residual != "projection"
        ]  # fmt: skip
        rows = [row for case in chosen for row in numerics.compare(case)]
    assert any(row.fails_alone() for row in rows) or any(pool.fails() for pool in numerics.pools(rows))

"""fusedres.tune: what it measures, what it keeps, and what it leaves as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from measured_times import BY_RULE, PADDED, by_rule, forget, pretend
from torch import Tensor, nn
from training_steps import ATEN, Operations, block_and_input, channels_last, step

import fusedres
from fusedres import times
from fusedres.backends import native_training
from fusedres.backends.native_training import RESULTS, Problem, Tiles
from fusedres.times import Calls, Times
from fusedres.tuning import convolutions

pytestmark = pytest.mark.usefixtures("fresh_times")

BF16 = torch.bfloat16


def test_tune_measures_each_result_once_and_chooses_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fused, _, x = block_and_input(dtype=BF16)
    measured = pretend(monkeypatch, {"direct": 1.0})
    progress = []
    report = fusedres.tune(fused, x.requires_grad_(), progress=lambda done, total: progress.append((done, total)))
    every = {"aten", "direct", "winograd 2", "winograd 4", "winograd 7"}
    assert [(row.result, row.chosen) for row in report.rows] == [(result, "direct") for result in RESULTS]
    assert {row.convolution for row in report.rows} == {"4x32x16x16 by 32x32x3x3"}
    assert [set(names) for names in measured] == [every] * 4 and progress == [(n, 4) for n in range(1, 5)]
    assert report.path.exists() and str(report).endswith(f"kept in {report.path}")
    shapes = tuple(x.shape), (32, 32, 3, 3), PADDED, BF16
    assert native_training.tiles(*shapes) == Tiles(1, 1, 1), "from now on"
    forget()
    assert native_training.tiles(*shapes) == Tiles(1, 1, 1), "in another process"
    fusedres.tune(fused, x)
    assert len(measured) == 8, "anew, when asked again"


@pytest.mark.parametrize("result", RESULTS)
def test_what_is_measured_is_what_the_step_would_call(result: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: dict[str, Mapping[str, int]] = {}

    def measure(calls: Calls, warm: Sequence[Tensor]) -> Times:
        for name, call in calls.items():
            with Operations() as operations:
                call()
            counts[name] = operations.kernels
        return {}

    monkeypatch.setattr(times, "measure", measure)
    problem = Problem(result, (2, 8, 9, 7), (16, 8, 3, 3), PADDED, BF16)
    with times.measuring():
        convolutions.measure(problem, (72, 1, 24, 8))
    operator = {"dx+add": "conv_", "dweight": "conv_dweight"}.get(result, "conv")
    own = ATEN | {operator: 1}
    assert counts == {name: ATEN if name == "aten" else own for name in native_training.candidates(problem)}
    assert len(counts) > 3


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_tune_needs_no_gradients_around_it(mode: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, {})
    fused, _, x = block_and_input()
    with mode():
        report = fusedres.tune(fused, x + 1)
        assert not torch.is_grad_enabled()
    assert [row.result for row in report.rows] == ["y", "dx", "dweight"]


def test_tune_asks_for_what_the_step_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, {})
    fused, _, x = block_and_input("Bottleneck", 64, 32, 2)
    fused.conv2.weight.requires_grad_(False)
    with torch.autocast("cpu", BF16):
        report = fusedres.tune(fused, x)
    rows = {(row.convolution, row.result) for row in report.rows}
    assert rows == {
        ("4x64x16x16 by 32x64x1x1", "y"),
        ("4x64x16x16 by 32x64x1x1", "dweight"),
        ("4x32x16x16 by 32x32x3x3, stride 2x2", "y"),
        ("4x32x16x16 by 32x32x3x3, stride 2x2", "dx"),
        ("4x32x8x8 by 128x32x1x1", "y"),
        ("4x32x8x8 by 128x32x1x1", "dx"),
        ("4x32x8x8 by 128x32x1x1", "dweight"),
        ("4x64x16x16 by 128x64x1x1, stride 2x2", "y"),
        ("4x64x16x16 by 128x64x1x1, stride 2x2", "dweight"),
    }
    assert all("bfloat16" in entry for entry in times._known(times.table_of("cpu")))


def test_tune_finds_what_the_rule_leaves_to_aten(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, {"winograd 2": 1.0, "winograd 4": 1.0})
    fused, _, x = block_and_input("BasicBlock", 32, 24)
    shape = tuple(x.shape), (24, 32, 3, 3), PADDED
    monkeypatch.setattr(native_training, "_by_rule", lambda *given: 0)
    assert step(fused, x)[1] == ATEN
    fusedres.tune(fused, x)
    assert native_training.tiles(*shape).of_y > 1 and step(fused, x)[1]["conv_dweight"] == 2


def test_tune_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, {})
    model = nn.Sequential(fusedres.BasicBlock(32, 32), nn.Dropout(0.5)).to(memory_format=torch.channels_last)
    x = channels_last(torch.randn(4, 32, 16, 16)).requires_grad_()
    model[0].conv1.weight.grad = torch.ones_like(model[0].conv1.weight)
    state, value, random = copy.deepcopy(model.state_dict()), x.detach().clone(), torch.get_rng_state()
    assert fusedres.tune(model, x).rows
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(x, value) and x.grad is None
    assert model[0].conv1.weight.grad.eq(1).all() and model[0].conv2.weight.grad is None
    for name, kept in model.state_dict().items():
        assert torch.equal(kept, state[name]), name
    assert native_training.collected is None


def test_an_error_or_interrupt_keeps_what_was_measured_until_then(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, {})
    fused, _, x = block_and_input()

    def interrupt(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fusedres.tune(fused, x, progress=interrupt)
    forget()
    assert len(times._known(times.table_of("cpu"))) == 2
    with pytest.raises(RuntimeError, match="to have 32 channels"):
        fusedres.tune(fused, x[:, :3])
    assert native_training.collected is None


def test_what_did_not_settle_is_left_to_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(times, "measure", lambda calls, warm: {})
    fused, _, x = block_and_input()
    report = fusedres.tune(fused, x)
    assert {row.chosen for row in report.rows} == {"winograd 4"} and not report.path.exists()
    assert "did not settle: by the rule" in str(report)


@pytest.mark.parametrize("how", BY_RULE)
def test_it_is_refused_where_the_rule_chooses_anyway(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fused, _, x = block_and_input()
    reason = "tune would measure what nothing uses: .* and a forced backend leave the choice to the rule"
    with by_rule(how, monkeypatch), pytest.raises(RuntimeError, match=reason):
        fusedres.tune(fused, x)


def test_a_model_without_a_choice_says_so() -> None:
    report = fusedres.tune(nn.Conv2d(3, 3, 1), torch.randn(2, 3, 4, 4))
    assert report.rows == () and "nothing to choose from" in str(report)


def test_a_model_elsewhere_is_refused() -> None:
    with pytest.raises(ValueError, match=r"on a CPU, and this one is on meta; .* python -m fusedres tune"):
        fusedres.tune(nn.Conv2d(3, 3, 1, device="meta"), torch.randn(2, 3, 4, 4))


def test_real_times_are_positive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(times, "_AGREEMENT", float("inf"))  # other tests run beside this one
    fused, _, x = block_and_input(dtype=BF16)
    report = fusedres.tune(fused, x)
    assert len(report.rows) == 3
    assert all(row.times and min(row.times.values()) > 0 for row in report.rows)

"""Who computes a training step's convolutions: the rule, what tune measured, and what leaves it to the rule."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from training_steps import ATEN, RULE, Operations, block_and_input, channels_last, relative_error, step

import fusedres
from fusedres import cache, dispatch, times
from fusedres.backends import Geometry, native_training
from fusedres.backends.native_training import RESULTS, Problem, Tiles
from fusedres.times import Calls, Times
from fusedres.tuning import convolutions

BF16 = torch.bfloat16
PADDED = Geometry(padding=(1, 1))
Measured = list[list[str]]


def forget() -> None:
    """As in a new process."""
    times._read.clear()
    native_training.forget()
    dispatch.clear()


@pytest.fixture(autouse=True)
def fresh(native: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Times may choose, and a folder of its own keeps them; the library is loaded already."""
    monkeypatch.setenv("FUSEDRES_CACHE", str(tmp_path / "cache"))
    torch.use_deterministic_algorithms(False)
    forget()
    yield
    torch.use_deterministic_algorithms(True, warn_only=True)
    forget()


def pretend(monkeypatch: pytest.MonkeyPatch, found: Callable[[str], float]) -> Measured:
    """Have measuring return a candidate's made-up times; returns who was measured."""
    seen: Measured = []

    def measure(calls: Calls, warm: Sequence[Tensor]) -> Times:
        seen.append(list(calls))
        for call in calls.values():
            call()
        return {name: found(name) for name in calls}

    monkeypatch.setattr(times, "measure", measure)
    return seen


def forge(chosen: Mapping[str, str], dtype: torch.dtype = torch.float32, channels: int = 32) -> None:
    """Keep times that name candidates for results of the block's convolutions."""
    weight = channels, channels, 3, 3
    problems = [Problem(result, (4, channels, 16, 16), weight, PADDED, dtype) for result in chosen]
    entries = {
        problem.entry: {name: 2.0 - (name == chosen[problem.result]) for name in native_training.candidates(problem)}
        for problem in problems
    }
    times.table_of("cpu").save(entries)
    forget()


# The choice


EVERY = [(torch.float32, name) for name in ("aten", "winograd 2", "winograd 4")]
EVERY += [(BF16, name) for name in ("aten", "direct", "winograd 2", "winograd 4", "winograd 7")]


@pytest.mark.parametrize("dtype, name", EVERY, ids=str)
def test_every_candidate_that_a_table_can_name_computes_the_step(dtype: torch.dtype, name: str) -> None:
    fused, eager, x = block_and_input(dtype=dtype)
    forge(dict.fromkeys(RESULTS, name), dtype)
    problems = [Problem(result, tuple(x.shape), (32, 32, 3, 3), PADDED, dtype) for result in RESULTS]
    assert {native_training.name_of(native_training.choose(problem)[0]) for problem in problems} == {name}
    found, count = step(fused, x)
    assert count == (ATEN if name == "aten" else RULE)
    plain, _ = step(eager, x)
    exact, _ = step(copy.deepcopy(eager).double(), x.double())
    factor = 4 if dtype is torch.float32 else 1.1
    for quantity, expected in exact.items():
        error, theirs = (relative_error(one[quantity], expected) for one in (found, plain))
        assert error <= factor * theirs + 1e-7, quantity


@pytest.mark.parametrize("policy", ["fast", "lean", "min"])
def test_each_result_has_its_own_choice(policy: str) -> None:
    fused, _, x = block_and_input(dtype=BF16)
    forge({"y": "direct", "dx": "winograd 7", "dx+add": "aten", "dweight": "aten"}, BF16)
    shapes = tuple(x.shape), (32, 32, 3, 3), PADDED, BF16
    assert native_training.tiles(*shapes) == Tiles(1, 7, 0)
    assert native_training.tiles(*shapes, joins=True) == Tiles(1, 0, 0)
    with fusedres.set_memory(policy):
        _, count = step(fused, x)
    assert count == ATEN | {"conv": 3}


def test_the_rules_choice_stays_unless_another_is_clearly_faster() -> None:
    problem = Problem("y", (4, 32, 16, 16), (32, 32, 3, 3), PADDED, BF16)
    first, second, *rest = native_training.candidates(problem)
    for ms, expected in ((0.89, second), (0.91, first)):
        table = {first: 1.0, second: ms} | dict.fromkeys(rest, 3.0)
        times.table_of("cpu").save({problem.entry: table})
        forget()
        assert native_training.name_of(native_training.choose(problem)[0]) == expected


def test_times_without_a_candidate_are_left_to_the_rule() -> None:
    problem = Problem("y", (4, 32, 16, 16), (32, 32, 3, 3), PADDED, BF16)
    rule, _ = native_training.choose(problem)
    times.table_of("cpu").save({problem.entry: {"aten": 1.0, "winograd 9": 0.1}})
    forget()
    assert native_training.choose(problem) == (rule, {})


def test_what_is_not_accurate_enough_is_no_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    def names(result: str, sizes: tuple[int, ...], dtype: torch.dtype, geometry: Geometry = PADDED) -> set[str]:
        problem = Problem(result, sizes, (sizes[1], sizes[1], 3, 3), geometry, dtype)
        return set(native_training.candidates(problem))

    tiles = {"winograd 2", "winograd 4", "winograd 7"}
    large, few = (8, 64, 28, 28), (1, 64, 28, 28)
    assert names("y", large, torch.float32) == {"aten", "winograd 2", "winograd 4"}
    assert names("y", (8, 3, 28, 28), torch.float32) == {"aten"}, "too few channels"
    assert names("dweight", few, torch.float32) == {"aten", "direct", "winograd 2"}, "too few tiles"
    assert names("dweight", few, BF16) == {"aten", "direct", "winograd 2", "winograd 7"}
    assert names("dweight", large, BF16) == {"aten", "direct"} | tiles
    assert names("dx", large, BF16, Geometry((2, 2), (1, 1))) == {"aten"}, "no kernel"
    assert names("y", large, BF16, Geometry((2, 2), (1, 1))) == {"aten", "direct"}
    assert names("y", large, BF16, Geometry(padding=(1, 1), groups=2)) == {"aten"}
    monkeypatch.setenv("FUSEDRES_WINOGRAD", "0")
    assert names("y", large, torch.float32) == {"aten"}
    assert names("dweight", large, BF16) == {"aten", "direct"}


def test_a_table_is_read_once_and_a_choice_holds_for_the_process() -> None:
    fused, _, x = block_and_input()
    assert step(fused, x)[1] == RULE
    path = times.table_of("cpu").path
    assert not path.exists(), "an ordinary step keeps nothing"
    problem = Problem("y", tuple(x.shape), (32, 32, 3, 3), PADDED, torch.float32)
    times.table_of("cpu").save({problem.entry: {"aten": 1.0, "winograd 2": 2.0, "winograd 4": 2.0}})
    assert step(fused, x)[1] == RULE
    forget()
    assert step(fused, x)[1] == RULE | {"conv": 1}


def test_an_ordinary_step_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = pretend(monkeypatch, lambda name: 1.0)
    fused, _, x = block_and_input()
    with times.measuring():
        step(fused, x)
    assert not measured and not cache.tables(cache.location())


@pytest.mark.parametrize("results, count", [(RESULTS, ATEN), (["y"], RULE | {"conv": 1})], ids=["all", "y"])
def test_times_are_for_a_number_of_threads(results: Sequence[str], count: Mapping[str, int]) -> None:
    forge(dict.fromkeys(results, "aten"))
    fused, _, x = block_and_input()
    assert step(fused, x)[1] == count
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert step(fused, x)[1] == RULE
    finally:
        torch.set_num_threads(threads)
    assert step(fused, x)[1] == count


@pytest.mark.parametrize("how", ["FUSEDRES_TUNE", "deterministic", "forced"])
def test_what_leaves_the_choice_to_the_rule(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forge(dict.fromkeys(RESULTS, "aten"))
    fused, _, x = block_and_input()
    if how == "FUSEDRES_TUNE":
        monkeypatch.setenv("FUSEDRES_TUNE", "0")
    if how == "deterministic":
        torch.use_deterministic_algorithms(True)
    if how == "forced":
        with fusedres.use_backend("native"):
            count = step(fused, x)[1]
            with pytest.raises(RuntimeError, match="a forced backend leave the choice to the rule"):
                fusedres.tune(fused, x)
    else:
        count = step(fused, x)[1]
        with pytest.raises(RuntimeError, match="tune would measure what nothing uses"):
            fusedres.tune(fused, x)
        assert not [choice for choice in fusedres.explain(fused, x).choices if "measured" in choice.objections]
    assert count == RULE


@pytest.mark.parametrize("damage", ["garbage", "other digest", "other kernels", "no times"])
def test_a_table_that_is_not_to_be_used_is_ignored_with_one_warning(damage: str) -> None:
    forge(dict.fromkeys(RESULTS, "aten"))
    path = times.table_of("cpu").path
    if damage == "garbage":
        path.write_bytes(b"\x00{")
    elif damage == "other digest":
        path.write_text(path.read_text().replace("1.0", "1.5", 1))
    elif damage == "other kernels":
        path.write_text(path.read_text().replace("native-", "native-f", 1))
    else:
        times.table_of("cpu").save({"entry": {"aten": "fast"}})
    forget()
    fused, _, x = block_and_input()
    with pytest.warns(
        UserWarning, match=r"times of convolutions in .* are ignored, because .*; optimize and tune"
    ) as w:
        assert step(fused, x)[1] == RULE
    assert len(w) == 1 and step(fused, x)[1] == RULE


# tune


def test_tune_measures_each_result_once_and_chooses_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fused, _, x = block_and_input(dtype=BF16)
    measured = pretend(monkeypatch, lambda name: 1.0 if name == "direct" else 2.0)
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
    pretend(monkeypatch, lambda name: 1.0)
    fused, _, x = block_and_input()
    with mode():
        report = fusedres.tune(fused, x + 1)
        assert not torch.is_grad_enabled()
    assert [row.result for row in report.rows] == ["y", "dx", "dweight"]


def test_tune_asks_for_what_the_step_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, lambda name: 1.0)
    fused, _, x = block_and_input("Bottleneck", 64, 32, 2)
    fused.conv2.weight.requires_grad_(False)
    with torch.autocast("cpu", BF16):
        report = fusedres.tune(fused, x)
    rows = {(row.convolution, row.result) for row in report.rows}
    assert rows == {
        ("4x64x16x16 by 32x64x1x1", "y"),
        ("4x64x16x16 by 32x64x1x1", "dweight"),
        ("4x32x16x16 by 32x32x3x3, stride 2x2", "y"),
        ("4x32x8x8 by 128x32x1x1", "y"),
        ("4x32x8x8 by 128x32x1x1", "dx"),
        ("4x32x8x8 by 128x32x1x1", "dweight"),
        ("4x64x16x16 by 128x64x1x1, stride 2x2", "y"),
        ("4x64x16x16 by 128x64x1x1, stride 2x2", "dweight"),
    }
    assert all("bfloat16" in entry for entry in times._known(times.table_of("cpu")))


def test_tune_finds_what_the_rule_leaves_to_aten(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, lambda name: 1.0 if name.startswith("winograd") else 2.0)
    fused, _, x = block_and_input("BasicBlock", 32, 24)
    shape = tuple(x.shape), (24, 32, 3, 3), PADDED
    monkeypatch.setattr(native_training, "_by_rule", lambda *given: Tiles(0, 0, 0))
    assert step(fused, x)[1] == ATEN
    fusedres.tune(fused, x)
    assert native_training.tiles(*shape).of_y > 1 and step(fused, x)[1]["conv_dweight"] == 2


def test_tune_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, lambda name: 1.0)
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
    pretend(monkeypatch, lambda name: 1.0)
    fused, _, x = block_and_input()

    def interrupt(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fusedres.tune(fused, x, progress=interrupt)
    times._read.clear()
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


def test_a_model_without_a_choice_says_so() -> None:
    report = fusedres.tune(nn.Conv2d(3, 3, 1), torch.randn(2, 3, 4, 4))
    assert report.rows == () and "nothing to choose from" in str(report)


def test_a_model_elsewhere_is_refused() -> None:
    with pytest.raises(ValueError, match=r"on a CPU, and this one is on meta; .* python -m fusedres tune"):
        fusedres.tune(nn.Conv2d(3, 3, 1, device="meta"), torch.randn(2, 3, 4, 4))


def test_real_times_are_positive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(times, "_AGREEMENT", 100.0)  # other tests run beside this one
    fused, _, x = block_and_input(dtype=BF16)
    report = fusedres.tune(fused, x)
    assert len(report.rows) == 3
    assert all(row.times and min(row.times.values()) > 0 for row in report.rows)


# What is told


def test_explain_has_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    fused, _, x = block_and_input(dtype=BF16)
    pretend(monkeypatch, lambda name: {"direct": 1.0, "aten": 1.5}.get(name, 2.0))
    fusedres.tune(fused, x.requires_grad_())
    rows = [choice for choice in fusedres.explain(fused, x).choices if choice.op == "conv"]
    assert [row.backend for row in rows] == ["native"] * 2
    expected = "; ".join(f"{result}: direct 1 ms, aten 1.5 ms" for result in RESULTS)
    assert [row.objections["measured"] for row in rows] == [expected] * 2
    assert f"measured: {expected}" in str(fusedres.explain(fused, x))


def test_explain_tells_of_atens_convolutions_that_were_measured() -> None:
    fused, _, x = block_and_input()
    forge(dict.fromkeys(RESULTS, "aten"))
    rows = [choice for choice in fusedres.explain(fused, x).choices if choice.op == "conv"]
    assert [row.backend for row in rows] == ["reference"] * 2
    assert rows[0].objections["native"] == "aten was measured to be as fast"
    assert rows[0].objections["measured"].startswith("y: aten 1 ms, winograd 4 2 ms; dx: aten")

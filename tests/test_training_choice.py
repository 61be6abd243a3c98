"""Who computes a training step's convolutions: the rule, what tune measured, and what leaves it to the rule."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from statistics import median

import pytest
import torch
from measured_times import BY_RULE, PADDED, by_rule, forge, forget, pretend
from training_steps import ATEN, RULE, block_and_input, relative_error, step

import fusedres
from fusedres import cache, times
from fusedres.backends import Geometry, native_training
from fusedres.backends.native_training import RESULTS, Problem, Tiles

pytestmark = pytest.mark.usefixtures("fresh_times")

BF16 = torch.bfloat16
EVERY = [(torch.float32, name) for name in ("aten", "direct", "winograd 2", "winograd 4")]
EVERY += [(BF16, name) for name in ("aten", "direct", "winograd 2", "winograd 4", "winograd 7")]


@pytest.mark.parametrize("dtype, name", EVERY, ids=str)
def test_every_candidate_that_a_table_can_name_computes_the_step(dtype: torch.dtype, name: str) -> None:
    everywhere = dtype is BF16 or name != "direct"  # in float32 the direct form of y and dx is aten's
    chosen = dict.fromkeys(RESULTS, "aten") | dict.fromkeys(RESULTS if everywhere else ["dweight"], name)
    forge(chosen, dtype)
    problems = [Problem(result, (4, 32, 16, 16), (32, 32, 3, 3), PADDED, dtype) for result in RESULTS]
    assert [native_training.name_of(native_training.choose(problem)[0]) for problem in problems] == [*chosen.values()]
    expected_count = ATEN if name == "aten" else RULE if everywhere else ATEN | {"conv_dweight": 2}
    ratios: dict[str, list[float]] = {}
    for seed in range(5):
        torch.manual_seed(seed)
        fused, eager, x = block_and_input(dtype=dtype)
        found, count = step(fused, x)
        assert count == expected_count
        plain, _ = step(eager, x)
        exact, _ = step(copy.deepcopy(eager).double(), x.double())
        for quantity, expected in exact.items():
            error, theirs = (relative_error(one[quantity], expected) for one in (found, plain))
            ratios.setdefault(quantity, []).append(error / theirs)
    bar = 4 if dtype is torch.float32 and name.startswith("winograd") else 1.1
    for quantity, of_one in ratios.items():  # by the median: a ReLU that rounds to the other side is luck, ours or not
        assert median(of_one) <= bar, quantity


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
    for result in ("y", "dx", "dx+add", "dweight"):
        assert names(result, large, BF16, Geometry((2, 2), (1, 1))) == {"aten", "direct"}
    assert names("dx", large, torch.float32, Geometry((2, 2), (1, 1))) == {"aten"}
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
    measured = pretend(monkeypatch, {})
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


@pytest.mark.parametrize("how", BY_RULE)
def test_what_leaves_the_choice_to_the_rule(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forge(dict.fromkeys(RESULTS, "aten"))
    fused, _, x = block_and_input()
    with by_rule(how, monkeypatch):
        assert step(fused, x)[1] == RULE
        assert not [choice for choice in fusedres.explain(fused, x).choices if "measured" in choice.objections]


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


# What explain tells


def test_explain_has_the_rules_choice_without_times() -> None:
    fused, _, x = block_and_input()
    rows = [choice for choice in fusedres.explain(fused, x).choices if choice.op == "conv"]
    assert [row.backend for row in rows] == ["native"] * 2 and not any("measured" in row.objections for row in rows)
    contiguous = fusedres.explain(fused.to(memory_format=torch.contiguous_format), x.contiguous())
    assert not [row for row in contiguous.choices if row.op == "conv"], "aten's"


def test_explain_has_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    fused, _, x = block_and_input(dtype=BF16)
    pretend(monkeypatch, {"direct": 1.0, "aten": 1.5})
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

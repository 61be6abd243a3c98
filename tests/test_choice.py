"""Who computes a convolution of an optimized model: the rule, what was measured, and the table that keeps it."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from measured_times import BY_RULE, Asked, by_rule, forget, pretend
from optimized import assert_close, images, make, outputs
from torch import nn
from torchvision_models import resnet

import fusedres
from fusedres import build, cache, times
from fusedres.native_sources import NATIVE
from fusedres.optimization import Optimization

NAMES = ("native direct", "native winograd 2", "native winograd 4", "onednn")

pytestmark = pytest.mark.usefixtures("fresh_times")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Who was timed; oneDNN is made the fastest."""
    return pretend(monkeypatch, {"onednn": 1.0})


def network() -> nn.Module:
    """Its convolutions are of three problems."""
    return make(
        lambda: nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), resnet.BasicBlock(16, 16), resnet.BasicBlock(16, 16), nn.Flatten()
        )
    )


def backends(report: Optimization) -> list[str]:
    return [line.backend for line in report.convolutions]


@pytest.mark.parametrize("fastest", NAMES)
def test_the_fastest_is_taken_and_each_computes_the_same(fastest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = pretend(monkeypatch, {fastest: 1.0})
    eager, x = network(), images(2, 3, 16, 16)
    model = copy.deepcopy(eager)
    report = fusedres.optimize(model, example=x)
    assert [sorted(names) for names in asked] == [list(NAMES)] * 3
    assert backends(report) == [fastest.split()[0]] * 5
    assert all((line.reason or "").startswith(f"{fastest} 1 ms, ") for line in report.convolutions)
    assert_close(outputs(model, x), eager, x)


def test_another_process_measures_nothing_again(asked: Asked) -> None:
    x = images(2, 3, 16, 16)
    fusedres.optimize(network(), example=x)
    assert len(asked) == 3
    forget()
    assert backends(fusedres.optimize(network(), example=x)) == ["onednn"] * 5
    later = network()
    fusedres.optimize(later)
    with torch.no_grad():
        assert [c.backend for c in fusedres.explain(later, x).choices] == ["onednn"] * 5
        assert "onednn 1 ms" in fusedres.explain(later, x).choices[0].objections["measured"]
    assert len(asked) == 3


def test_what_was_not_measured_is_left_to_the_rule(asked: Asked) -> None:
    model = network()
    fusedres.optimize(model, example=images(2, 3, 16, 16))
    with torch.no_grad():
        assert [c.backend for c in fusedres.explain(model, images(3, 3, 16, 16)).choices] == ["native"] * 5
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with torch.no_grad():
            assert [c.backend for c in fusedres.explain(model, images(2, 3, 16, 16)).choices] == ["native"] * 5
    finally:
        torch.set_num_threads(threads)
    assert len(asked) == 3


def test_every_size_is_served_by_its_own_choice(asked: Asked) -> None:
    eager = network()
    model = copy.deepcopy(eager)
    fusedres.optimize(model, example=images(2, 3, 16, 16))
    for shape in ((2, 3, 16, 16), (1, 3, 9, 7), (2, 3, 16, 16), (3, 3, 16, 16)):
        x = images(*shape)
        assert_close(outputs(model, x), eager, x)


def test_the_rules_choice_stays_unless_another_is_clearly_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, {"onednn": 1.95})
    assert backends(fusedres.optimize(network(), example=images(2, 3, 16, 16))) == ["native"] * 5


@pytest.mark.parametrize("how", BY_RULE)
def test_nothing_is_measured_nor_read_where_that_is_not_wanted(
    how: str, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = images(2, 3, 16, 16)
    fusedres.optimize(network(), example=x)
    asked.clear()
    with by_rule(how, monkeypatch):
        report = fusedres.optimize(network(), example=x)
    assert backends(report) == ["native"] * 5 and {line.reason for line in report.convolutions} == {None}
    assert not asked


def test_an_unknown_word_for_tuning_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDRES_TUNE", "maybe")
    model = network()
    with pytest.raises(ValueError, match="FUSEDRES_TUNE must be 0 or 1; got 'maybe'"):
        fusedres.optimize(model, example=images(2, 3, 16, 16))
    assert type(model) is nn.Sequential


def test_nothing_is_measured_in_a_capture(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="before the capture"):
        fusedres.optimize(network(), example=images(2, 3, 16, 16))
    assert not asked


def test_a_damaged_table_is_ignored_with_one_warning_and_replaced(asked: Asked) -> None:
    x = images(2, 3, 16, 16)
    fusedres.optimize(network(), example=x)
    (path,) = cache.tables(cache.location())
    path.write_text(path.read_text().replace("1.0", "1.5", 1))
    forget()
    with pytest.warns(UserWarning, match=r"times of convolutions in .* are ignored, because it is damaged") as caught:
        fusedres.optimize(network(), example=x)
    assert len(caught) == 1 and len(asked) == 6
    forget()
    fusedres.optimize(network(), example=x)
    assert len(asked) == 6


@pytest.mark.parametrize("ms", [0.0, -1.0, math.nan, math.inf, "1", None])
def test_a_table_with_a_time_that_is_none_is_ignored(ms: object) -> None:
    table = times.table_of("cpu")
    table.save({"entry": {"onednn": ms}})
    with pytest.warns(UserWarning, match="entry has a time that is none"):
        assert times._known(table) == {}


def test_times_of_another_library_are_ignored(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    fusedres.optimize(network(), example=images(2, 3, 16, 16))
    forget()
    found = build.library(NATIVE)
    assert isinstance(found, build.Library)
    other = build.Library(Path("/elsewhere/native-0123/native.so"), "cached")
    monkeypatch.setattr(build, "library", lambda target: other)
    with pytest.warns(UserWarning, match="its kernels is 'native-.*' and not 'native-0123'"):
        assert times._known(times.table_of("cpu")) == {}


def test_what_another_process_kept_meanwhile_stays(asked: Asked) -> None:
    x, table = images(2, 3, 16, 16), times.table_of("cpu")
    assert times._known(table) == {}
    theirs = {"theirs": {"onednn": 1.0}}
    table.save(theirs)
    fusedres.optimize(network(), example=x)
    forget()
    kept = times._known(table)
    assert len(asked) == 3 and len(kept) == 4 and kept.items() >= theirs.items()


def test_where_nothing_can_be_kept_it_says_so_and_works(
    asked: Asked, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("")
    monkeypatch.setenv("FUSEDRES_CACHE", str(occupied))
    with pytest.warns(UserWarning, match="what was measured of convolutions is not kept"):
        report = fusedres.optimize(network(), example=images(2, 3, 16, 16))
    assert backends(report) == ["onednn"] * 5


def test_an_error_keeps_what_was_measured_until_then(asked: Asked) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(3, 16, 3)).eval()
    with pytest.raises(RuntimeError):
        fusedres.optimize(model, example=images(2, 3, 16, 16))
    assert type(model) is nn.Sequential and len(times._known(times.table_of("cpu"))) == len(asked) > 0


Clock = Callable[[str, list[float]], Callable[[], None]]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Calls by name that take these seconds, one after the other; `clock.order` tells who was called."""
    now, order = [0.0], []

    def call(name: str, seconds: list[float]) -> Callable[[], None]:
        def called() -> None:
            now[0] += seconds[min(order.count(name), len(seconds) - 1)]
            order.append(name)

        return called

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    call.order = order
    return call


def test_the_least_of_several_times_count_and_all_take_turns(clock: Clock) -> None:
    calls = {"a": clock("a", [0.5, 0.03125, 0.125, 0.03125, 0.03125]), "b": clock("b", [0.0625])}
    assert times.measure(calls, [torch.ones(3)]) == {"a": 31.25, "b": 62.5}
    assert clock.order == ["a", "b"] * (1 + times._ROUNDS)
    fluke = {"a": clock("c", [0.03125, 0.03125, 0.03, 0.03125]), "b": clock("d", [0.0625])}
    assert times.measure(fluke, [torch.ones(3)]) == {"a": 31.25, "b": 62.5}


def test_times_that_do_not_come_up_again_are_none(clock: Clock) -> None:
    unsteady = [0.25, 0.0625, 0.125, 0.03125, 0.25, 0.5, 0.25, 0.5]
    assert times.measure({"a": clock("a", unsteady), "b": clock("b", [0.0625])}, [torch.ones(3)]) == {}
    later = [*unsteady[:5], 0.03125, 0.03125]
    assert times.measure({"a": clock("c", later), "b": clock("d", [0.0625])}, [torch.ones(3)]) == {
        "a": 31.25,
        "b": 62.5,
    }


def test_long_calls_have_longer_to_settle(clock: Clock) -> None:
    assert times.measure({"a": clock("a", [2.0]), "b": clock("b", [1.0])}, [torch.ones(3)]) == {"a": 2e3, "b": 1e3}


def test_what_did_not_settle_is_left_to_the_rule_and_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(times, "measure", lambda calls, warm: {})
    report = fusedres.optimize(network(), example=images(2, 3, 16, 16))
    assert backends(report) == ["native"] * 5 and {line.reason for line in report.convolutions} == {None}
    assert not cache.tables(cache.location())


def test_real_times_are_positive_and_kept_apart_by_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(times, "_AGREEMENT", 100.0)  # other tests run beside this one
    report = fusedres.optimize(network(), example=images(2, 3, 16, 16))
    known = times._known(times.table_of("cpu"))
    assert len(known) == 3
    assert all(set(found) == set(NAMES) and min(found.values()) > 0 for found in known.values())
    assert all(line.reason and "onednn" in line.reason for line in report.convolutions)

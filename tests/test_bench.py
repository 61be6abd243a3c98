"""Comparisons: what takes part, what is checked, what is timed and what is left after an interrupt."""

import copy
import csv
import io
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import optional
import pytest
import small_models
import torch
from torch import nn

import fusedres
from fusedres.bench import comparison, networks
from fusedres.bench.contestants import BASELINE, ENTRIES, FROZEN, FUSED, OPTIMIZED, PEERS, POST_OPS, Absent
from fusedres.bench.timing import interleave, speedup
from fusedres.bench.work import Inference, Training, Work, peak_bytes, settle
from fusedres.swap import Fused

CPU = torch.device("cpu")
EAGER_AND_FUSED = {name: ENTRIES[name] for name in (BASELINE, "eager channels_last", FUSED)}


def work(training=True, dtype=torch.float32):
    return Work("tiny", training, 4, 16, dtype, CPU)


def compared(given, entries, rounds=3, on_round=lambda: None):
    found = comparison.begin(given)
    steps = comparison.prepare(small_models.tiny(), given, entries, found, lambda name: None)
    comparison.race(steps, given, found, rounds=rounds, seconds=60, on_round=on_round)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_every_contestant_is_checked_and_timed_in_turn(training, dtype):
    found = compared(work(training, dtype), EAGER_AND_FUSED)
    assert [result.name for result in found.results] == list(EAGER_AND_FUSED)
    assert found.complete
    for result in found.results:
        assert result.absent is None and len(result.samples_ms) == 3
        assert set(result.errors) == ({"outputs", "gradients"} if training else {"outputs"})
        assert result.ratio.low <= result.ratio.median <= result.ratio.high
        assert result.images_per_second == pytest.approx(4e3 / median(result.samples_ms))
        assert result.peak_bytes > 0
    assert found.results[0].ratio.median == 1


class Off(Inference):
    def __call__(self):
        return super().__call__() * 1.2


def wrong(model, given):
    return Off(model.eval(), given.images(), given)


def test_wrong_results_of_ours_are_never_timed():
    with pytest.raises(comparison.WrongResults, match="its outputs are off by"):
        compared(work(training=False), {**EAGER_AND_FUSED, FUSED: wrong})


def test_a_wrong_peer_is_left_out():
    found = compared(work(training=False), {BASELINE: ENTRIES[BASELINE], "peer": wrong})
    assert found.results[0].samples_ms and not found.results[1].samples_ms
    assert found.results[1].absent.startswith("peer: its outputs are off by")
    assert "not timed" in found.results[1].absent


def fails(model, given):
    raise NotImplementedError("no operator 'aten::[odd]'\nin a graph of many lines")


def test_a_peer_that_fails_is_left_out():
    found = compared(work(training=False), {BASELINE: ENTRIES[BASELINE], "peer": fails})
    assert found.complete and found.results[0].samples_ms and not found.results[1].samples_ms
    assert found.results[1].absent == "it fails: NotImplementedError: no operator 'aten::[odd]'"


@pytest.mark.parametrize("name", [BASELINE, FUSED, OPTIMIZED])
def test_what_fails_of_ours_is_an_error(name):
    with pytest.raises(NotImplementedError):
        compared(work(training=False), {BASELINE: ENTRIES[BASELINE], name: fails})


def test_wrong_gradients_are_wrong_results():
    class Backwards(Training):
        def outcome(self):
            outcome = super().outcome()
            return {**outcome, "gradients": {name: -g for name, g in outcome["gradients"].items()}}

    def entry(model, given):
        return Backwards(model, given.images(), given)

    with pytest.raises(comparison.WrongResults, match="its gradients are off"):
        compared(work(), {BASELINE: ENTRIES[BASELINE], FUSED: entry})


def test_what_draws_at_random_is_compared_without_and_timed_with_it():
    given, model = work(), small_models.random()
    steps = comparison.prepare(model, given, EAGER_AND_FUSED, comparison.begin(given), lambda name: None)
    assert list(steps) == list(EAGER_AND_FUSED)
    for step in steps.values():
        _, path, dropout, _ = step.model
        assert (path.drop_prob, dropout.p) == (0.5, 0.5)


def test_a_model_that_draws_otherwise_can_not_be_compared():
    class Noisy(nn.Module):
        def forward(self, x):
            return x + 9 * torch.randn_like(x)

    model, given = nn.Sequential(small_models.tiny(), Noisy()), work()
    with pytest.raises(comparison.WrongResults, match=r"eager: .* the model draws at random"):
        comparison.prepare(model, given, EAGER_AND_FUSED, comparison.begin(given), lambda name: None)


def test_an_interrupt_leaves_the_rounds_so_far():
    given, count = work(), []

    def interrupt():
        count.append(None)
        if len(count) == 2:
            raise KeyboardInterrupt

    found = comparison.begin(given)
    steps = comparison.prepare(small_models.tiny(), given, EAGER_AND_FUSED, found, lambda name: None)
    with pytest.raises(KeyboardInterrupt):
        comparison.race(steps, given, found, rounds=9, seconds=60, on_round=interrupt)
    assert not found.complete
    assert {len(result.samples_ms) for result in found.results} == {2}
    assert all(result.ratio for result in found.results)


def test_a_model_without_blocks_has_no_fused_contestant():
    with pytest.raises(Absent, match="nothing in this model is fused"):
        ENTRIES[FUSED](small_models.plain(), work())


def test_a_model_of_our_own_blocks_has_no_eager_form():
    given = work()
    with pytest.raises(Absent, match="name torchvision's or timm's model"):
        comparison.prepare(small_models.always_fused(), given, EAGER_AND_FUSED, comparison.begin(given), print)


def test_a_fused_model_is_compared_with_itself_unfused():
    given, model = work(), small_models.tiny()
    fusedres.fuse(model)
    steps = comparison.prepare(model, given, EAGER_AND_FUSED, comparison.begin(given), lambda name: None)
    fused = [any(isinstance(module, Fused) for module in step.model.modules()) for step in steps.values()]
    assert fused == [False, False, True]


def test_the_compiled_contestant_agrees(monkeypatch):
    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: self.register_buffer("compiled", torch.ones(())))
    step = ENTRIES["torch.compile"](small_models.tiny(), work())
    assert "compiled" in dict(step.model.named_buffers())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_optimized_contestant_agrees_and_has_no_training_step(dtype):
    entries = {name: ENTRIES[name] for name in (BASELINE, OPTIMIZED)}
    _, result = compared(work(training=False, dtype=dtype), entries).results
    assert result.absent is None and result.ratio is not None and result.peak_bytes > 0
    for name in (OPTIMIZED, FROZEN):
        with pytest.raises(Absent, match="inference only"):
            ENTRIES[name](small_models.tiny(), work())
    with pytest.raises(Absent, match="no convolution found"):
        ENTRIES[OPTIMIZED](nn.Sequential(nn.Linear(16, 16)), work(training=False))


def test_a_compiled_model_that_is_not_frozen_is_no_contestant(monkeypatch):
    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: None)
    with pytest.raises(Absent, match="did not fold the weights into its graph"):
        ENTRIES[FROZEN](small_models.tiny(), work(training=False))


@pytest.mark.parametrize("name", list(PEERS))
def test_a_peer_agrees_where_it_is_installed_or_says_why_not(name):
    if name != POST_OPS:
        optional.package(name)
    found = compared(work(training=False), {BASELINE: ENTRIES[BASELINE], name: PEERS[name]})
    assert found.results[1].absent is None and found.results[1].samples_ms
    with pytest.raises(Absent, match="inference only"):
        PEERS[name](small_models.tiny(), work(training=True))


def test_the_hand_wired_peer_runs_nothing_but_onednns_convolutions():
    step = PEERS[POST_OPS](small_models.tiny(), work(training=False))
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step()
    names = {event.key for event in profiler.key_averages()}
    assert any("mkldnn" in name and "pointwise" in name for name in names)
    assert not any("fusedres_native" in name or name == "aten::batch_norm" for name in names)
    with pytest.raises(Absent, match=r"it has no convolution in torch\.float64"):
        PEERS[POST_OPS](small_models.tiny().double(), work(training=False, dtype=torch.float64))


def test_a_peer_that_is_missing_says_how_to_have_it(monkeypatch):
    monkeypatch.setattr("fusedres.bench.contestants.find_spec", lambda name: None)
    with pytest.raises(Absent, match=r"openvino is not installed; pip install 'fusedres\[peers\]'"):
        PEERS["openvino"](small_models.tiny(), work(training=False))


@pytest.mark.skipif(sys.platform != "linux", reason="a process reads its own peak from /proc, which Linux alone has")
def test_a_process_of_its_own_tells_what_a_step_takes_of_the_machine():
    root = Path(__file__).parents[1]
    case = "memory policies, resnet18, training step, batch 2, 64 x 64, bf16, cpu"
    command = [sys.executable, root / "benchmarks" / "test_memory.py", case, "fusedres min"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(root)}, check=True, stdout=subprocess.PIPE)
    assert 1e8 < int(done.stdout) < 4e9


def test_peak_memory_is_the_most_that_is_held_at_once():
    class Holding(nn.Module):
        def forward(self, x):
            a = torch.empty(1_000_000)
            b = torch.empty(2_000_000)
            del a
            return torch.empty(500_000) + b[:500_000]

    found = peak_bytes(Inference(Holding(), torch.ones(1), work(training=False)), CPU)
    assert 4 * 3_000_000 <= found < 4 * 3_100_000


def test_what_was_held_before_a_step_does_not_count():
    kept = []

    class Keeping(nn.Module):
        def forward(self, x):
            kept.append(torch.empty(1_000_000))
            return kept[-1][:3] + x

    step = Inference(Keeping(), torch.ones(1), work(training=False))
    assert len({peak_bytes(step, CPU) for _ in range(3)}) == 1


def test_comparing_leaves_a_model_as_it_was():
    given, model = work(), small_models.tiny()
    before = copy.deepcopy(model.state_dict())
    step = Training(model, given.images(), given)
    step.outcome()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    step()
    assert not all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_new_model_gets_the_statistics_of_a_trained_one():
    model = small_models.tiny()
    settle(model)
    assert model[3].bn2.weight.unique().tolist() == pytest.approx([0.2])
    assert model[3].bn1.weight.unique().tolist() == model[4].downsample[1].weight.unique().tolist() == [1]
    assert model[4].bn1.running_mean.abs().max() > 0.05 and model[4].bn1.running_var.std() > 0.05
    again = small_models.tiny()
    settle(again)
    assert torch.equal(model[1].running_var, again[1].running_var)


def test_the_ratio_is_paired_and_its_interval_holds_it():
    # both contestants slow down together: unpaired medians would call them equal
    baseline, contestant = [2.0, 20.0, 200.0, 2.0, 20.0], [1.0, 10.0, 100.0, 1.0, 10.0]
    assert speedup(baseline, contestant) == speedup(baseline, contestant)
    ratio = speedup(baseline, contestant)
    assert (ratio.low, ratio.median, ratio.high) == (2, 2, 2)
    assert speedup([1.0, 2.0, 3.0], [1.0, 1.0, 1.0]).low == 1


def test_contestants_take_turns_in_changing_order():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    rounds = list(interleave(calls, CPU, rounds=6, sample_ms=1e-9, seconds=60))
    assert len(rounds) == 6 and all(set(times) == set("abc") for times in rounds)
    timed = ["".join(order[-18:][i : i + 3]) for i in range(0, 18, 3)]
    assert all(sorted(turn) == list("abc") for turn in timed) and len(set(timed)) > 1


def test_models_by_name():
    assert len(list(networks.build("small_models:tiny").children())) == 8
    assert type(networks.build("resnet18")).__module__.startswith("torchvision")
    assert type(networks.build("timm/resnet10t")).__module__.startswith("timm")
    assert networks.image_size(networks.build("timm/resnet10t")) == 176
    small = networks.build("cifar/resnet18")
    assert networks.image_size(small) == 32
    assert small.state_dict().keys() == fusedres.models.cifar_resnet18().state_dict().keys()
    small.load_state_dict(fusedres.models.cifar_resnet18().state_dict())
    assert networks.image_size(small_models.tiny()) == 224


@pytest.mark.parametrize(
    "name, hint",
    [
        ("resnet5O", "did you mean resnet50"),
        ("small_models:huge", "has no function 'huge'"),
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("small_models:not_a_model", "must return an nn.Module, got int"),
        ("mxnet/resnet50", "choose torchvision or timm"),
        ("!?", "give a name of torchvision or timm"),
    ],
)
def test_a_wrong_name_says_what_would_be_right(name, hint):
    with pytest.raises(networks.UnknownModel, match=hint.replace("?", r"\?")):
        networks.build(name)


def test_a_csv_has_a_column_for_every_fact():
    found = compared(work(training=False), {BASELINE: ENTRIES[BASELINE], "peer": wrong})
    rows = list(csv.DictReader(io.StringIO(found.csv())))
    assert rows[1]["absent"] and rows[1]["median_ms"] == ""
    assert {"device", "threads", "torch", "commit", "malloc"} <= set(rows[0])

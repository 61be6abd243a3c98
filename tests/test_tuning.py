"""Tuning the Triton kernels, without a GPU: what the table holds, what is ignored, which configuration is chosen."""

from __future__ import annotations

import random
import warnings
from dataclasses import astuple
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from fusedres import cache
from fusedres.backends.triton import backward, bn_act, launch, tuned
from fusedres.backends.triton.configurations import (
    APPLY,
    ARCHITECTURES,
    BLOCK_PASSES,
    PASSES,
    POOL_APPLY,
    STATISTICS,
    Config,
    default,
)
from fusedres.backends.triton.view import View
from fusedres.tuning import kernels

DEVICE = "NVIDIA Imaginary 9000"
VIEW = View(1, 256 * 56 * 56, 256, True)
ENTRIES = {tuned.key(kind, VIEW, torch.bfloat16): kind.configs[-1] for kind in PASSES}


@pytest.fixture(autouse=True)
def own_table(monkeypatch, tmp_path):
    monkeypatch.setenv("FUSEDRES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuned, "_read", {})


def test_what_was_saved_is_found_by_another_process() -> None:
    path = tuned.save(DEVICE, ENTRIES)
    tuned._read.clear()
    assert {entry: tuned.find(DEVICE, entry) for entry in ENTRIES} == ENTRIES
    assert tuned.find(DEVICE, "apply/bfloat16/channels_last/7/3") is None
    assert {entry.name for entry in path.parent.iterdir()} == {path.name, cache.TABLES_LOCK}


def test_tuning_adds_to_a_table_and_replaces_what_it_found_before() -> None:
    entry, other = list(ENTRIES)[:2]
    tuned.save(DEVICE, {entry: STATISTICS.configs[0]})
    tuned.save(DEVICE, {other: APPLY.configs[0], entry: STATISTICS.configs[1]})
    assert tuned.load(DEVICE) == {entry: STATISTICS.configs[1], other: APPLY.configs[0]}


def test_no_table_is_no_warning() -> None:
    assert tuned.load(DEVICE) == {}


def ignored(reason: str) -> None:
    with pytest.warns(UserWarning, match=f"are ignored, because {reason}.*; remove the file, or tune again") as caught:
        assert tuned.find(DEVICE, next(iter(ENTRIES))) is None
    assert tuned.find(DEVICE, next(iter(ENTRIES))) is None  # errors if it warns again
    assert len(caught) == 1


def test_another_devices_table_is_ignored() -> None:
    tuned.save("other", ENTRIES).rename(tuned.path_of(DEVICE))
    ignored("its device is 'other' and not")


def test_the_table_of_another_triton_is_ignored(monkeypatch) -> None:
    with monkeypatch.context() as before:
        before.setattr(tuned, "triton", SimpleNamespace(__version__="2.0"))
        tuned.save(DEVICE, ENTRIES)
    tuned._read.clear()
    ignored("its triton is '2.0' and not")


def test_a_configuration_that_is_not_declared_is_ignored() -> None:
    tuned.save(DEVICE, {next(iter(ENTRIES)): Config(64, 1, 1, 1)})
    tuned._read.clear()
    ignored("statistics/.* has a configuration that is not declared")


def test_a_file_that_is_a_folder_is_ignored() -> None:
    tuned.path_of(DEVICE).mkdir(parents=True)
    ignored("it can't be read .IsADirectoryError.")


def mutate(text: bytes, generator: random.Random) -> bytes:
    """One to three random edits."""
    data = bytearray(text)
    for _ in range(generator.randint(1, 3)):
        at = generator.randrange(len(data) or 1)
        kind = generator.randrange(5)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << generator.randrange(8)
        elif kind == 1:
            data[at:at] = generator.randbytes(generator.randint(1, 8))
        elif kind == 2:
            del data[at : at + generator.randint(1, 40)]
        elif kind == 3:
            del data[at:]
        else:  # a digit for a digit: still JSON, and often still a declared configuration
            digits = [i for i, byte in enumerate(data) if chr(byte).isdigit()]
            if digits:
                data[generator.choice(digits)] = ord(str(generator.randrange(10)))
    return bytes(data)


def test_a_thousand_damaged_tables_crash_nothing_and_choose_nothing_wrong() -> None:
    path = tuned.save(DEVICE, ENTRIES)
    text, generator, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(1000):
        path.write_bytes(mutate(text, generator))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = tuned.load(DEVICE)
        assert found == (ENTRIES if not caught else {}) and len(caught) <= 1
        refused += len(caught)
    assert refused > 900


WRONG_VALUES = [None, True, 0, -1, 1.0, 1024.0, "4", [], {}, [1024, 4, 4], [1024, 4, 4, 5, 1], 2**70]


def test_a_thousand_tables_of_wrong_contents_choose_what_is_declared_or_nothing() -> None:
    """Their digests are right: whoever wrote them meant it."""
    generator, refused = random.Random(0), 0
    declared = {id(config) for kind in PASSES for config in kind.configs}
    for _ in range(1000):
        entries = {entry: list(astuple(config)) for entry, config in ENTRIES.items()}
        entry = generator.choice(list(entries))
        wrong, how = generator.choice(WRONG_VALUES), generator.randrange(4)
        if how == 0:
            entries[entry] = wrong
        elif how == 1:
            entries[entry][generator.randrange(4)] = wrong
        elif how == 2:
            entries[entry] = list(astuple(generator.choice(generator.choice(PASSES).configs)))
        else:
            entries[generator.choice(["", "nonsense", "apply", "none/bfloat16/contiguous/7/7"])] = entries.pop(entry)
        tuned._table(DEVICE).save(entries)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = tuned.load(DEVICE)
        assert len(caught) == (not found)
        assert all(id(config) in declared for config in found.values()), "the very objects: 1024.0 equals 1024"
        refused += not found
    assert 500 < refused < 1000


def test_forced_comes_before_tuned_and_tuned_before_the_default() -> None:
    device, wanted = launch.Device(DEVICE, 80, 108), APPLY.configs[-1]
    first = default(APPLY, 80, 2)
    assert wanted != first == launch.chosen(APPLY, VIEW, torch.bfloat16, device)
    tuned.save(DEVICE, {tuned.key(APPLY, VIEW, torch.bfloat16): wanted})
    assert launch.chosen(APPLY, VIEW, torch.bfloat16, device) == wanted
    with launch.forced(APPLY, APPLY.configs[1]):
        assert launch.chosen(APPLY, VIEW, torch.bfloat16, device) == APPLY.configs[1]
    for other in (VIEW._replace(channels=64), VIEW._replace(pixels=100), VIEW._replace(channels_last=False)):
        assert launch.chosen(APPLY, other, torch.bfloat16, device) == default(APPLY, 80, 2)
    assert launch.chosen(APPLY, VIEW, torch.float16, device) == default(APPLY, 80, 2)


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("capability", ARCHITECTURES)
@pytest.mark.parametrize("kind", PASSES, ids=lambda kind: kind.name)
def test_a_default_has_the_bytes_in_flight_that_memory_wants_and_no_more(kind, capability, itemsize) -> None:
    wanted, chosen = ARCHITECTURES[capability].bytes_wanted(), default(kind, capability, itemsize)
    flying = {config: kind.bytes_in_flight(config, itemsize) for config in kind.configs}
    enough = [config for config in kind.configs if flying[config] >= wanted]
    assert chosen == (enough[0] if enough else max(kind.configs, key=flying.__getitem__))


def test_defaults_differ_between_architectures_and_serve_those_between_and_beyond() -> None:
    chosen = {capability: tuple(default(kind, capability, 2) for kind in PASSES) for capability in ARCHITECTURES}
    assert set(chosen) == {80, 86, 89, 90, 100, 120} and len(set(chosen.values())) > 2
    for unknown, known in ((75, 80), (87, 86), (103, 100), (121, 120)):
        assert tuple(default(kind, unknown, 2) for kind in PASSES) == chosen[known]


@pytest.fixture
def imaginary_gpu(monkeypatch):
    """Launches do nothing; a call takes as long as the forced configuration's tile is far from 2048."""
    launches = []
    monkeypatch.setattr(launch, "launch", lambda kernel, *_: launches.append(kernel))
    monkeypatch.setattr(launch, "device_of", lambda device: launch.Device(DEVICE, 90, 132))
    monkeypatch.setattr(kernels, "cache_bytes", lambda device: 1 << 20)

    def time_ms(calls, device):
        for call in calls:
            call()
        (config,) = launch._forced.values()
        return abs(config.tile - 2048) + config.unroll

    monkeypatch.setattr(kernels, "time_ms", time_ms)
    return launches


def test_tune_keeps_the_fastest_of_every_pass_and_reports_its_progress(imaginary_gpu) -> None:
    seen = []
    launch.forget_plans()
    x = torch.empty(256, 256, 56, 56, dtype=torch.bfloat16, device="meta").contiguous(memory_format=torch.channels_last)
    assert launch.Plan.of(APPLY, VIEW, x).config == default(APPLY, 90, 2)
    shapes, stems = [x.shape], [(256, 256, 56, 56)]
    path = kernels.tune_shapes(
        shapes, stems=stems, device="meta", progress=lambda done, total: seen.append((done, total))
    )
    assert path == tuned.path_of(DEVICE) and imaginary_gpu
    best = {kind: min(kind.configs, key=lambda c: abs(c.tile - 2048) + c.unroll) for kind in PASSES}
    views = {kind: VIEW if kind is not POOL_APPLY else VIEW._replace(pixels=256 * 28 * 28) for kind in PASSES}
    found = {tuned.key(kind, views[kind], torch.bfloat16): config for kind, config in best.items()}
    assert tuned.load(DEVICE) == found
    assert launch.Plan.of(APPLY, VIEW, x).config == best[APPLY] != default(APPLY, 90, 2)
    total = sum(len(kind.configs) for kind in PASSES)
    assert seen == [(done, total) for done in range(1, total + 1)]
    assert not launch._forced


def test_running_statistics_are_none_of_tunings(imaginary_gpu, monkeypatch) -> None:
    moved = []

    def finish(kernel, groups, channels, *arguments, **_):
        if kernel.__name__ == "statistics_finish":
            moved.append(arguments[2:4])

    for module in (bn_act, backward):
        monkeypatch.setattr(module, "finish", finish)
    kernels.tune_shapes([(256, 256, 56, 56)], stems=[(256, 64, 112, 112)], device="meta")
    assert moved and set(moved) == {(None, None)}


def test_what_was_found_before_an_interrupt_is_kept(imaginary_gpu) -> None:
    def interrupt(done, _):
        if done == sum(len(kind.configs) for kind in BLOCK_PASSES) + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kernels.tune_shapes([(256, 256, 56, 56), (256, 64, 56, 56)], stems=[], device="meta", progress=interrupt)
    tuned._read.clear()
    assert tuned.load(DEVICE).keys() == {tuned.key(kind, VIEW, torch.bfloat16) for kind in BLOCK_PASSES}


def test_tuning_inside_a_capture_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="a CUDA graph's capture can't; tune before"):
        kernels.tune_shapes()

"""python -m fusedres: what each command prints, its exit status, and what remains of it without the extra."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import python_backend
import torch

import fusedres
from fusedres import __main__ as entry
from fusedres import build, cache, cli, commands, dispatch, doctor, host, machine, times
from fusedres.backends import reference
from fusedres.native_sources import CUDA, NATIVE, VARIANTS
from fusedres.tuning import kernels


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command line in this process; returns its status, stdout and stderr."""

    def command(*words):
        monkeypatch.setattr(sys, "argv", ["fusedres", *words])
        monkeypatch.setattr(cli.console, "width", 200)
        capsys.readouterr()  # what came before is not the command's
        status = entry.main()
        return status, *capsys.readouterr()

    return command


def test_info_names_versions_devices_and_who_serves_what(run):
    status, printed, _ = run("info", "--json")
    found = json.loads(printed)
    assert status == 0
    assert found["versions"]["torch"] == torch.__version__
    assert found["devices"][0]["device"] == "cpu"
    assert {row["op"] for row in found["backends"]} == {"bn_act", "affine_act", "bn_act_pool", "conv_act"}
    assert {row["backend"] for row in found["backends"]} <= {"native", "triton", "onednn", "reference"}
    lines = run("info")[1].splitlines()
    assert [line for line in lines if line.startswith("bn_act ") and "float32, bfloat16" in line]


def test_info_says_why_a_backend_does_not_serve(run):
    with fusedres.use_backend("reference"):
        rows = machine.facts()["backends"]
    assert {row["backend"] for row in rows} == {"reference"}


def test_info_keeps_rows_apart_that_are_served_differently(monkeypatch):
    rows = [
        {"op": "o", "device": "cpu", "dtype": dtype, "layout": layout, "backend": backend, "objections": {}}
        for dtype, layout, backend in (
            ("a", "l", "x"),
            ("a", "m", "y"),
            ("b", "l", "x"),
            ("b", "m", "y"),
            ("c", "l", "x"),
        )
    ]
    assert [re.split("  +", line) for line in machine._backend_lines(rows)[1:]] == [
        ["o", "cpu", "a, b, c", "l", "x"],
        ["o", "cpu", "a, b", "m", "y"],
    ]


def test_info_names_the_architectures_of_the_cuda_library(run, monkeypatch, tmp_path):
    made = build.Library(tmp_path / "cuda-1" / "cuda.so", "cached")
    made.path.parent.mkdir()
    made.path.write_bytes(b"")
    compiler = "nvcc -gencode=arch=compute_90a,code=sm_90a -gencode=arch=compute_80,code=compute_80"
    cache.seal(made.path.parent, "cuda.so", {"compiler": compiler})
    monkeypatch.setitem(build._resolved, CUDA, made)
    assert machine.facts()["cuda_library"]["compiled_for"] == ["sm_90a", "compute_80"]
    assert "CUDA library: " in run("info")[1]

    facts = {"architecture": 90, "registers": 115, "blocks_per_multiprocessor": 1, "on_chip_bytes": 27 << 20}
    devices = {"cuda:0 NVIDIA Imaginary": [{"name": "forward bfloat16", **facts}]}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(host, "facts", lambda: {"cpu": None, "cuda": {"architectures": ["9.0"], "devices": devices}})
    assert machine.facts()["cuda_library"]["kernels"] == devices
    words = "forward bfloat16: sm_90, 115 registers, 1 at a time on a multiprocessor, 27.0 MiB of a tensor on chip"
    assert f"  cuda:0 NVIDIA Imaginary\n    {words}\n" in run("info")[1]


def test_info_knows_the_variant_that_runs(native, run, monkeypatch):
    library = json.loads(run("info", "--json")[1])["library"]
    assert library["compiled_for"] == list(VARIANTS)
    assert set(library["runs_as"].values()) <= set(VARIANTS)
    assert library["runs_as"]["float64"] == "portable"


def test_the_cap_on_the_instruction_set_shows(native):
    environment = os.environ | {"FUSEDRES_CPU_ISA": "avx2"}
    command = [sys.executable, "-W", "error", "-m", "fusedres", "info", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["library"]["runs_as"]["float32"] in ("avx2", "portable")
    assert found["environment"]["FUSEDRES_CPU_ISA"] == "avx2"


def test_doctor_finds_nothing_wrong(run):
    status, printed, _ = run("doctor")
    assert status == 0
    for op in machine.OPS:
        assert f"ok      {op} on reference, cpu" in printed
    if not torch.cuda.is_available():
        assert printed.count("torch finds no CUDA device") == 2
    assert doctor.FAILED not in printed


def test_doctor_finds_a_wrong_kernel(run):
    def off(*arguments):
        y, *others = python_backend.BACKEND.kernels["affine_act_forward"](*arguments)
        return (y * 1.01, *others)

    kernels = {**python_backend.BACKEND.kernels, "affine_act_forward": off}
    broken = replace(python_backend.BACKEND, name="broken", kernels=kernels)
    fusedres.ops.register_backend(broken)
    try:
        status, printed, _ = run("doctor")
    finally:
        fusedres.ops.unregister_backend(broken)
    wrong = [line for line in printed.splitlines() if line.startswith(doctor.FAILED)]
    assert status == 1
    assert len(wrong) == 1 and "affine_act on broken" in wrong[0] and "y is off" in wrong[0]


def test_doctor_finds_a_wrong_convolution(run, monkeypatch):
    taken = reference.BACKEND.convolution

    def off(*arguments):
        return taken.run(*arguments) * 1.01

    dispatch_order = [
        replace(b, convolution=replace(b.convolution, run=off)) if b.name == "reference" else b for b in dispatch.ORDER
    ]
    monkeypatch.setattr(dispatch, "ORDER", dispatch_order)
    findings = {finding.subject: finding for finding in doctor.examine()}
    assert findings["conv_act on reference, cpu"].status == doctor.FAILED
    assert "y is off" in findings["conv_act on reference, cpu"].detail


def test_doctor_gives_the_fix_for_what_is_missing(monkeypatch):
    monkeypatch.setattr(build, "_resolved", {NATIVE: build.Unavailable("there is none; install g++")})
    fusedres.dispatch.clear()
    findings = {finding.subject: finding for finding in doctor.examine()}
    fusedres.dispatch.clear()
    assert findings["bn_act on native, cpu"].status == doctor.MISSING
    assert "install g++" in findings["bn_act on native, cpu"].detail
    assert findings["CPU library"].status == doctor.MISSING


@pytest.fixture
def two_entries(tmp_path, monkeypatch):
    """A cache with the entry of this environment and an older one."""
    monkeypatch.setenv("FUSEDRES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "entry_name", lambda target: "native-new")
    root = cache.open_private(cache.location())
    for name in ("native-new", "native-old"):
        (root / name).mkdir()
        (root / name / "native.so").write_bytes(b"0" * 2**20)
        cache.seal(root / name, "native.so", {})
    (root / "tmp-of-a-killed-build").mkdir()
    cache.table(root, "NVIDIA Imaginary 9000").write_bytes(b"0" * 2**20)
    cache.remember_failure(root / "native-other", "no space")
    return root


def names(root):
    return sorted(path.name for path in root.iterdir() if path.name != "lock")


TUNED = "tuned-NVIDIA-Imaginary-9000.json"
FAILURE = "failed-native-other"


def test_cache_lists_and_leaves_alone(run, two_entries):
    status, printed, _ = run("cache")
    assert status == 0 and f"{two_entries}: 3.0 MiB\n" in printed
    assert f"{TUNED}  1.00 MiB" in printed
    assert names(two_entries) == [FAILURE, "native-new", "native-old", "tmp-of-a-killed-build", TUNED]


def test_info_lists_what_was_tuned(run, two_entries):
    found = json.loads(run("info", "--json")[1])["tuned"]
    assert found == [{"path": str(two_entries / TUNED), "bytes": 2**20}]
    assert f"{TUNED}  what tuning found" in run("info")[1]


def test_a_cache_that_was_never_used_is_empty(run, monkeypatch, tmp_path):
    monkeypatch.setenv("FUSEDRES_CACHE", str(tmp_path / "none"))
    assert run("cache")[1] == f"{tmp_path / 'none'}: 0.0 MiB, empty\n"
    assert run("cache", "--clear")[1].startswith("nothing to remove")
    assert not (tmp_path / "none").exists()


def test_what_looks_like_markup_is_printed_as_it_is(run, monkeypatch, tmp_path):
    home = tmp_path / "[bold]:cat:"
    monkeypatch.setenv("FUSEDRES_CACHE", str(home))
    assert run("cache")[1] == f"{home}: 0.0 MiB, empty\n"


def test_cache_prunes_what_is_of_an_older_key(run, two_entries):
    status, printed, _ = run("cache", "--prune")
    assert status == 0 and printed.startswith("removed:\n  native-old\n")
    assert names(two_entries) == [FAILURE, "native-new", TUNED]


def test_cache_keeps_what_could_not_be_built_again(run, two_entries, monkeypatch):
    def no_compiler(target):
        raise build.BuildError(f"nothing compiles {target.name}")

    monkeypatch.setattr(build, "entry_name", no_compiler)
    assert run("cache", "--prune")[0] == 0
    assert names(two_entries) == [FAILURE, "native-new", "native-old", TUNED]


def test_cache_clears(run, two_entries):
    status, printed, _ = run("cache", "--clear")
    assert status == 0 and all(f"  {name}\n" in printed for name in ("native-new", "native-old", TUNED))
    assert names(two_entries) == []


def test_clearing_leaves_files_of_others(run, two_entries):
    (two_entries / "thesis").mkdir()
    (two_entries / "thesis" / "chapter1").write_text("")
    (two_entries / "tuned-by-hand.txt").write_text("")
    run("cache", "--clear")
    assert names(two_entries) == ["thesis", "tuned-by-hand.txt"]


def test_an_error_is_one_line_and_a_traceback_on_demand(run, monkeypatch):
    monkeypatch.setenv("FUSEDRES_BUILD", "everything")
    monkeypatch.setattr(machine, "facts", lambda: 1 / 0)
    status, _, error = run("info")
    assert status == 1 and error.count("\n") == 1 and "ZeroDivisionError" in error
    assert "Traceback" in run("--debug", "info")[2]


@pytest.mark.parametrize(
    "words, hint",
    [
        (
            ["bench", "resnet18", "--dtype", "int8"],
            "'int8' is not one of 'fp32', 'bf16', 'fp16'; see python -m fusedres bench",
        ),
        (["profile"], "Missing argument 'model'; see python -m fusedres profile --help"),
        (["frobnicate"], "No such command 'frobnicate'; see python -m fusedres --help"),
        (["build", "fpga"], "'fpga' is not one of 'cpu', 'cuda'"),
    ],
)
def test_wrong_use_is_one_line_too(run, words, hint):
    status, printed, error = run(*words)
    assert (status, printed) == (2, "") and error.count("\n") == 1 and hint in error


def test_our_own_errors_say_what_to_do_and_no_more(run):
    assert run("bench", "resnet5O")[2].endswith("resnet50d?\n")


def test_no_command_at_all_shows_the_commands(run):
    status, printed, _ = run()
    assert status == 0 and "bench" in printed and "doctor" in printed


def test_an_interrupted_command_says_so_by_its_status(run, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(machine, "facts", interrupt)
    assert run("info")[0] == commands.INTERRUPTED


def test_tune_hands_its_dtype_and_batch_on_and_prints_the_table(run, monkeypatch):
    def tune(shapes, *, stems, dtypes, device, progress):
        progress(1, 2)
        assert (64, 512, 7, 7) in shapes and stems == [(64, 64, 112, 112)] and len(shapes) == len(kernels.NORMS)
        assert dtypes == (torch.float16,) and device.type == "cuda"

    def tune_convolutions(*, images, dtypes, device, progress):
        assert images == 64 and dtypes == (torch.float16,) and device.type == "cuda"
        progress(2, 2)
        return "the table"

    def rank(shapes, *, dtypes, device, progress):
        progress(1, 1)
        assert shapes == kernels.shapes_at(64) and dtypes == (torch.float16,) and device.type == "cuda"
        return "another"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cli, "tune_shapes", tune)
    monkeypatch.setattr(cli, "tune_products", tune_convolutions)
    monkeypatch.setattr(cli, "rank", rank)
    status, printed, _ = run("tune", "--dtype", "fp16", "--batch", "64")
    assert status == 0 and printed.split("\n")[:2] == ["the table", "another"]


def test_tune_for_a_gpu_needs_one_and_takes_no_model(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, _, error = run("tune", "--device", "cuda")
    assert status == 2 and "no CUDA device" in error
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for words in (("resnet50",), ("--size", "64")):
        status, _, error = run("tune", *words)
        assert status == 2 and "MODEL and --size are for --device cpu" in error


def test_tune_on_a_cpu_prints_what_was_chosen_and_where_it_is_kept(run, native, monkeypatch, tmp_path):
    monkeypatch.setattr(times, "measure", lambda calls, warm: {name: 1.0 + (name != "aten") for name in calls})
    monkeypatch.setattr(times, "_read", {})
    monkeypatch.setenv("FUSEDRES_CACHE", str(tmp_path / "cache"))
    torch.use_deterministic_algorithms(False)
    try:
        words = "tune", "small_models:tiny", "--batch", "2", "--size", "8", "--device", "cpu"
        status, printed, error = run(*words)
        assert (status, error) == (0, "") and f"kept in {times.table_of('cpu').path}" in printed
        assert re.search(r"2x8x8x8 by 16x8x1x1, stride 2x2 +dweight +aten +aten 1 ms, direct 2 ms", printed)
        assert "what tuning found" in run("info")[1] and "tuned-convolutions" in run("cache")[1]
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)
        dispatch.clear()
    status, _, error = run(*words)
    assert status == 1 and error.count("\n") == 1 and "deterministic algorithms" in error


@pytest.fixture
def without_the_extra(monkeypatch):
    monkeypatch.setattr(entry, "find_spec", lambda name: None)


def test_what_needs_no_extra_works_without_it(run, without_the_extra):
    assert json.loads(run("info", "--json")[1])["versions"]["fusedres"] == fusedres.__version__
    assert run("doctor")[0] == 0


@pytest.mark.parametrize("command", ["bench", "profile", "tune", "cache"])
def test_what_needs_the_extra_says_how_to_have_it(run, without_the_extra, command):
    status, printed, error = run(command, "resnet50", "--train")
    assert (status, printed) == (1, "")
    assert error.count("\n") == 1 and "pip install 'fusedres[cli]'" in error


def test_errors_are_one_line_without_the_extra_too(run, without_the_extra, monkeypatch):
    monkeypatch.setattr(machine, "facts", lambda: 1 / 0)
    status, _, error = run("info")
    assert status == 1 and error.count("\n") == 1 and "ZeroDivisionError" in error and "--debug" in error
    assert "Traceback" in run("--debug", "info")[2]

    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(machine, "facts", interrupt)
    assert run("info")[0] == commands.INTERRUPTED

"""The builder: what it finds, what it builds, what it refuses."""

from __future__ import annotations

import ctypes
import os
import pty
import shutil
import stat
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from stub_target import (
    ANSWER,
    Child,
    Fake,
    answer,
    ask_again,
    compiler_script,
    leftovers,
    origin,
    overwrite,
    refusal,
)

from fusedres import build, cache, compiler, target
from fusedres.build import Library
from fusedres.compiler import BuildError
from fusedres.target import Source, Target

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the compiled library is for Linux"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="builds a library: needs g++"),
]


# Finding and building


def test_builds_at_first_use_and_finds_it_afterwards(stub: Target, home: Path) -> None:
    assert build.resolved(stub) is None
    first = build.library(stub)
    assert isinstance(first, Library)
    assert first.origin == "built now"
    assert answer(first) == 42
    assert build.library(stub) is first
    assert build.resolved(stub) is first
    assert ask_again(stub) == Library(first.path, "cached")
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert leftovers(home) == []


def test_group_umask_does_not_spoil_the_cache(stub: Target) -> None:
    previous = os.umask(0o002)
    try:
        build.library(stub)
        assert origin(ask_again(stub)) == "cached"
    finally:
        os.umask(previous)


def test_one_file_can_be_compiled_for_several_variants(stub: Target) -> None:
    (stub.root / "answer.cpp").write_text('extern "C" int NAME() { return VALUE; }\n')
    variants = tuple(
        Source("answer.cpp", (f"-DNAME={name}", f"-DVALUE={value}"), name)
        for name, value in (("avx2", 2), ("avx512", 5))
    )
    found = build.library(replace(stub, sources=variants))
    assert isinstance(found, Library)
    library = ctypes.CDLL(str(found.path))
    assert (library.avx2(), library.avx512()) == (2, 5)


def test_registers_operators_through_the_stable_abi(stub: Target) -> None:
    import torch

    (stub.root / "answer.cpp").write_text(
        """#include <torch/csrc/stable/library.h>
#include <omp.h>
int64_t answer(int64_t x) { return x + (omp_get_max_threads() > 0); }
STABLE_TORCH_LIBRARY(fusedres_build_test, m) { m.def("answer(int x) -> int"); }
STABLE_TORCH_LIBRARY_IMPL(fusedres_build_test, CompositeExplicitAutograd, m) {
  m.impl("answer", TORCH_BOX(&answer));
}
"""
    )
    assert isinstance(build.library(replace(stub, links_torch=True, flags=("-std=c++17",))), Library)
    assert torch.ops.fusedres_build_test.answer(41) == 42
    runtimes = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "gomp" in line}
    assert len(runtimes) == 1


def test_key_covers_what_the_binary_depends_on(stub: Target, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gcc = compiler.find()
    keys = [target.key(stub, gcc).digest()]

    def changed(by: Target, chosen: compiler.Compiler = gcc) -> None:
        keys.append(target.key(by, chosen).digest())

    changed(replace(stub, flags=("-O2",)))
    changed(replace(stub, sources=(Source("answer.cpp", ("-O2",)),)))
    changed(stub, replace(gcc, version="g++ 99"))
    changed(stub, replace(gcc, argv=("/elsewhere/g++",)))
    changed(replace(stub, links_torch=True))
    monkeypatch.setattr(target, "_torch", lambda: target._Torch(tmp_path, "9.9"))
    changed(replace(stub, links_torch=True))
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    changed(stub)
    (stub.root / "answer.h").write_text("// a header\n")
    changed(stub)
    (stub.root / "answer.h").write_text("// another header\n")
    changed(stub)
    (stub.root / "answer.cpp").write_text(ANSWER + "// edited\n")
    changed(stub)
    assert len(set(keys)) == len(keys)


def test_key_does_not_depend_on_the_place(stub: Target, tmp_path: Path) -> None:
    shutil.copytree(stub.root, tmp_path / "moved")
    gcc = compiler.find()
    assert target.key(stub, gcc) == target.key(replace(stub, root=tmp_path / "moved"), gcc)


def test_binary_does_not_name_the_place(stub: Target) -> None:
    (stub.root / "answer.cpp").write_text('extern "C" const char* file() { return __FILE__; }\n')
    found = build.library(stub)
    assert isinstance(found, Library)
    assert str(stub.root).encode() not in found.path.read_bytes()


def test_a_library_built_ahead_comes_first(stub: Target, home: Path) -> None:
    path = build.build(stub, build.PREBUILT)
    found = build.library(stub)
    assert found == Library(path, "built ahead")
    assert answer(found) == 42
    assert not home.exists()
    assert sorted(p.name for p in path.parent.iterdir()) == ["manifest.json", "stub.so"]


def test_a_relative_folder_to_build_into_is_the_callers(
    stub: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    build.build(stub, Path("ahead"))
    assert (tmp_path / "ahead" / "stub" / "stub.so").exists()


def test_a_library_built_ahead_from_other_sources_is_passed_over(stub: Target) -> None:
    build.build(stub, build.PREBUILT)
    (stub.root / "answer.cpp").write_text(ANSWER.replace("42", "43"))
    found = build.library(stub)
    assert isinstance(found, Library)
    assert found.origin == "built now"
    assert answer(found) == 43


def test_a_damaged_library_built_ahead_is_passed_over_with_one_message(stub: Target) -> None:
    path = build.build(stub, build.PREBUILT)
    overwrite(path, path.read_bytes()[:100])
    with pytest.warns(RuntimeWarning, match=r"not what was built.*reinstall fusedres") as warned:
        assert answer(build.library(stub)) == 42
    assert len(warned) == 1


def test_build_raises_with_the_compilers_words(stub: Target, tmp_path: Path) -> None:
    (stub.root / "answer.cpp").write_text("#error this is no C++\n")
    with pytest.raises(BuildError, match=r"g\+\+ failed on answer \(exit code 1\): .*this is no C\+\+") as caught:
        build.build(stub, tmp_path / "into")
    assert "#error" in caught.value.output
    assert list((tmp_path / "into").iterdir()) == []
    with pytest.raises(BuildError, match="no C"):
        build.build(stub)


def test_build_raises_where_it_may_not_write(stub: Target) -> None:
    with pytest.raises(BuildError, match="can't be used: Not a directory"):
        build.build(stub, Path("/dev/null/into"))


def test_a_missing_source_is_a_reason(stub: Target) -> None:
    (stub.root / "answer.cpp").unlink()
    assert "answer.cpp can't be read" in refusal(build.library(stub))


# Switches


def test_disable_jit_uses_a_build_but_makes_none(stub: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDRES_DISABLE_JIT", "1")
    assert "FUSEDRES_DISABLE_JIT" in refusal(build.library(stub))
    build.build(stub)
    assert origin(ask_again(stub)) == "cached"


def test_build_none_turns_the_library_off(stub: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    build.build(stub)
    monkeypatch.setenv("FUSEDRES_BUILD", "none")
    assert refusal(build.library(stub)).startswith("FUSEDRES_BUILD=none")
    monkeypatch.setenv("FUSEDRES_BUILD", "rocm")
    assert "auto, none, cpu, cuda; got 'rocm'" in refusal(ask_again(stub))


@pytest.mark.parametrize(
    "chosen,xdg,expected",
    [
        ("/a/b", "/x", "/a/b"),
        ("", "/x", "/x/fusedres"),
        ("", "relative", "/home/u/.cache/fusedres"),
        ("", "", "/home/u/.cache/fusedres"),
        ("~/c", "/x", "/home/u/c"),
    ],
)
def test_location(chosen: str, xdg: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/u")
    monkeypatch.setenv("FUSEDRES_CACHE", chosen)
    monkeypatch.setenv("XDG_CACHE_HOME", xdg)
    assert cache.location() == Path(expected)


def test_the_compiler_sees_a_controlled_environment(
    stub: Target, products: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = compiler_script(tmp_path / "g++", f'env > {tmp_path}/env; cp {products}/answer.so "$last"')
    monkeypatch.setenv("CXX", f"{path} --first")
    monkeypatch.setenv("CPATH", "/evil")
    assert isinstance(build.library(stub), Library)
    names = {line.split("=")[0] for line in (tmp_path / "env").read_text().splitlines()}
    assert names - {"PWD", "SHLVL", "_", "OLDPWD"} <= {"PATH", "LD_LIBRARY_PATH", "HOME", "LC_ALL", "TMPDIR"}


# What is refused


def test_a_private_cache_is_required(stub: Target, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(pattern: str) -> None:
        with pytest.warns(RuntimeWarning, match=f"must be private.*{pattern}.*set FUSEDRES_CACHE") as warned:
            assert "must be private" in refusal(ask_again(stub))
        assert len(warned) == 1
        assert not home.is_dir() or list(home.iterdir()) == []

    home.mkdir()
    for mode in (0o777, 0o770, 0o1777):
        home.chmod(mode)
        refused("others may write")
    home.chmod(0o700)
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        refused("belongs to user")
    home.rename(home.with_name("elsewhere"))
    home.symlink_to("elsewhere")
    refused("symbolic link")
    home.unlink()
    home.write_text("")
    refused("wrong kind")


def test_the_lock_is_not_opened_through_a_link(stub: Target, home: Path, tmp_path: Path) -> None:
    home.mkdir(mode=0o700)
    (home / "lock").symlink_to(tmp_path / "victim")
    assert "can't be used" in refusal(build.library(stub))
    assert not (tmp_path / "victim").exists()


def flip_a_byte(entry: Path) -> None:
    content = bytearray((entry / "stub.so").read_bytes())
    content[-1] ^= 1
    overwrite(entry / "stub.so", bytes(content))


def link_the_library(entry: Path) -> None:
    (entry / "stub.so").rename(entry.parent.parent / "stub.so")
    (entry / "stub.so").symlink_to(entry.parent.parent / "stub.so")


def link_the_entry(entry: Path) -> None:
    entry.rename(entry.parent.parent / "entry")
    entry.symlink_to(entry.parent.parent / "entry")


def lead_elsewhere(entry: Path) -> None:
    shutil.copy(entry / "stub.so", entry.parent / "stub.so")
    manifest = entry / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"stub.so"', '"../stub.so"'))


def give_away(entry: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root gives files away")
    os.chown(entry / "stub.so", 12345, -1)


FAULTS: dict[str, Callable[[Path], object]] = {
    "truncated": lambda entry: overwrite(entry / "stub.so", (entry / "stub.so").read_bytes()[:100]),
    "emptied": lambda entry: overwrite(entry / "stub.so", b""),
    "tampered": flip_a_byte,
    "library gone": lambda entry: (entry / "stub.so").unlink(),
    "manifest gone": lambda entry: (entry / "manifest.json").unlink(),
    "manifest garbage": lambda entry: (entry / "manifest.json").write_bytes(b"\xff\x00"),
    "manifest of another shape": lambda entry: (entry / "manifest.json").write_text("[]"),
    "manifest leads elsewhere": lead_elsewhere,
    "others write the library": lambda entry: (entry / "stub.so").chmod(0o666),
    "others write the entry": lambda entry: entry.chmod(0o777),
    "library is a link": link_the_library,
    "entry is a link": link_the_entry,
    "entry is a file": lambda entry: (shutil.rmtree(entry), entry.write_text("")),
    "foreign-owned": give_away,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_spoiled_entry_is_refused_and_rebuilt_with_one_message(
    fault: str, stub: Target, home: Path, fake: Fake
) -> None:
    first = build.library(stub)
    assert isinstance(first, Library)
    FAULTS[fault](first.path.parent)
    with pytest.warns(RuntimeWarning, match="built again") as warned:
        found = ask_again(stub)
    assert len(warned) == 1
    assert found == Library(first.path, "built now")
    assert answer(found) == 42
    assert origin(ask_again(stub)) == "cached"
    assert fake.runs() == 4


def test_warnings_as_errors_do_not_escape(stub: Target) -> None:
    first = build.library(stub)
    assert isinstance(first, Library)
    overwrite(first.path, b"")
    child = Child.start("import warnings; warnings.simplefilter('error'); ask()")
    assert child.result() == ("Library", "built now")


# What is said


def test_a_quick_build_says_nothing(stub: Target, fake: Fake, capfd: pytest.CaptureFixture[str]) -> None:
    build.library(stub)
    assert capfd.readouterr() == ("", "")


def test_a_slow_build_says_one_line(
    stub: Target, home: Path, fake: Fake, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "NOTICE_SECONDS", 0)
    build.library(stub)
    assert capfd.readouterr() == ("", f"fusedres: building stub, once, in {home} (1 files)\n")


def test_a_terminal_shows_the_progress(stub: Target, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()
    with open(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setattr(compiler, "NOTICE_SECONDS", 0)
        build.library(stub)
        shown = os.read(ours, 4096).decode()
    os.close(ours)
    assert shown.splitlines()[0].startswith("fusedres: building stub")
    assert "[1/2] answer" in shown
    assert "[2/2] link" in shown
    assert shown.endswith("\r\033[K")


def test_no_stderr_is_no_fault(stub: Target, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(compiler, "NOTICE_SECONDS", 0)
    assert isinstance(build.library(stub), Library)

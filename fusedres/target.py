"""What is to be built, as data: sources with their flags, the key of a build, and the command lines."""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from fusedres import cache, compiler
from fusedres.compiler import BuildError, Compiler, Step

COMPILE_FLAGS = ("-fPIC", "-g0")
LINK_FLAGS = ("-shared", "-Wl,-z,relro,-z,now")
# The stable ABI of the oldest supported torch: the library then loads in every later one.
TORCH_FLAGS = ("-fopenmp", "-DTORCH_TARGET_VERSION=0x020b000000000000")
HEADER_SUFFIXES = (".h", ".inc", ".cuh")


@dataclass(frozen=True)
class Source:
    """One compilation of one file; a file compiled for several instruction sets is several Sources.

    Args:
        path: below the target's root.
        flags: beside the target's, such as ("-mavx2", "-mfma").
        variant: the word that tells it from the file's other Sources.
    """

    path: str
    flags: tuple[str, ...] = ()
    variant: str = ""

    @property
    def label(self) -> str:
        return f"{Path(self.path).stem} {self.variant}".rstrip()


@dataclass(frozen=True)
class Target:
    """One shared library.

    Args:
        name: the file's stem.
        root: the folder of the sources and on the include path; every header below it counts as a source.
        links_torch: whether it uses torch's stable ABI, to register operators, and torch's OpenMP runtime.
        find: finds the compiler, or raises BuildError.
    """

    name: str
    root: Path
    sources: tuple[Source, ...]
    flags: tuple[str, ...] = ()
    link_flags: tuple[str, ...] = ()
    links_torch: bool = True
    find: Callable[[], Compiler] = compiler.find

    @property
    def file(self) -> str:
        return f"{self.name}.so"


@dataclass(frozen=True)
class Key:
    """What a build depends on; a cached library is used for an equal key only.

    The stable ABI lets one binary serve later versions of torch. Still the cache goes by the exact version: a
    rebuild costs a minute, once, and picks up what torch's headers put into the binary. One built ahead,
    which perhaps can't be rebuilt where it is used, has to match in `target`, `sources` and `machine` only:
    there the ABI's promise counts.
    """

    target: str
    sources: str  # sha256 of the files and their flags
    machine: str
    libc: str  # systems of different age may share a home directory
    torch: str
    compiler: str

    def digest(self) -> str:
        return _digest(asdict(self))


@dataclass(frozen=True)
class _Torch:
    folder: Path
    version: str


def key(target: Target, chosen: Compiler | None) -> Key:
    """The key of building `target` here, with that compiler."""
    return Key(
        target=target.name,
        sources=sources_digest(target),
        machine=platform.machine(),
        libc=" ".join(platform.libc_ver()),
        torch=_torch().version if target.links_torch else "none",
        compiler=str(chosen or ""),
    )


def sources_digest(target: Target) -> str:
    """The sha256 of everything that the target itself decides, wherever its root is."""
    headers = sorted(path for path in target.root.rglob("*") if path.suffix in HEADER_SUFFIXES)
    content = {
        "headers": [[path.relative_to(target.root).as_posix(), _file_digest(path)] for path in headers],
        "sources": [
            [source.path, source.variant, source.flags, _file_digest(target.root / source.path)]
            for source in target.sources
        ],
        "flags": [
            target.flags,
            target.link_flags,
            target.links_torch,
            COMPILE_FLAGS,
            LINK_FLAGS,
            TORCH_FLAGS,
        ],
    }
    return _digest(content)


def steps(target: Target, chosen: Compiler, folder: Path) -> tuple[list[Step], Step]:
    """The compilations, which may run side by side, and then the link, all into `folder`."""
    torch = _torch() if target.links_torch else None
    flags = [*COMPILE_FLAGS, *target.flags, f"-I{target.root}", f"-ffile-prefix-map={target.root}=csrc"]
    if torch is not None:
        flags += [*TORCH_FLAGS, "-isystem", str(torch.folder / "include")]
    compilations = []
    for number, source in enumerate(target.sources):
        output = folder / f"{number}.o"
        argv = (*chosen.argv, *flags, *source.flags, "-c", str(target.root / source.path), "-o", str(output))
        compilations.append(Step(source.label, argv, output))
    output = folder / target.file
    objects = [str(step.output) for step in compilations]
    libraries = [] if torch is None else _torch_libraries(torch)
    argv = (*chosen.argv, *LINK_FLAGS, *objects, *target.link_flags, *libraries, "-o", str(output))
    return compilations, Step("link", argv, output)


def _torch() -> _Torch:
    """The installed torch, found without importing it."""
    spec = find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise BuildError("the compiled library needs torch's headers, and torch is not installed here; install it")
    folder = Path(next(iter(spec.submodule_search_locations)))
    found = re.search(r"__version__ = ['\"]([^'\"]+)['\"]", (folder / "version.py").read_text())
    if found is None or not (folder / "include" / "torch" / "csrc" / "stable").is_dir():
        raise BuildError(f"the torch in {folder} has no headers of the stable ABI; install torch 2.11 or later")
    return _Torch(folder, found[1])


def _torch_libraries(torch: _Torch) -> list[str]:
    # torch's own OpenMP runtime by its path, whatever the wheel calls it: never a second one in the process.
    # Through -Wl: nvcc takes no file for a library whose name ends in a version.
    openmp = sorted(f"-Wl,{path}" for path in (torch.folder / "lib").glob("libgomp*.so*"))
    return [f"-L{torch.folder / 'lib'}", "-ltorch_cpu", *(openmp[:1] or ["-lgomp"])]


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    try:
        return cache.digest(path)
    except OSError as error:
        raise BuildError(f"the source {path} can't be read ({error.strerror}); reinstall fusedres") from error

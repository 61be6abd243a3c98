"""Find, verify, build and load a compiled library: once per process, and built at most once per user.

`library(target)` looks for one that was built ahead and ships in the package, then in the user's verified
cache, and builds it there if need be. It never raises: what can't be had is an `Unavailable` with the reason.
`build(target)` builds on purpose, and raises.

    FUSEDRES_BUILD=none      at run time too: no compiled library is found, built or loaded
    FUSEDRES_DISABLE_JIT=1   nothing is built at first use; a library that exists already is used
    FUSEDRES_CACHE           the directory to build in
    CXX                      the compiler, with its first arguments
    CUDA_HOME, FUSEDRES_CUDA_ARCHITECTURES   for a library with CUDA sources: see fusedres/nvcc.py

Only the standard library is imported here and below: setup.py builds without importing the package.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fusedres import cache, compiler
from fusedres.cache import Refused
from fusedres.compiler import BuildError, Compiler, Progress
from fusedres.target import Key, Target, key, steps

PREBUILT = Path(__file__).parent / "prebuilt"
BUILD_CHOICES = ("auto", "none", "cpu", "cuda")
PORTABLE_FIELDS = ("target", "sources", "machine")


@dataclass(frozen=True)
class Library:
    """A loaded library, and where it came from: "built ahead", "cached" or "built now"."""

    path: Path
    origin: str


@dataclass(frozen=True)
class Unavailable:
    """Why there is no library: one sentence with the remedy."""

    reason: str


_resolved: dict[Target, Library | Unavailable] = {}
_resolving = threading.Lock()


def _renew_lock() -> None:
    # The thread that held it does not exist in a forked child.
    global _resolving
    _resolving = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def library(target: Target) -> Library | Unavailable:
    """The loaded library: found or built at the first call, then remembered."""
    found = _resolved.get(target)
    if found is None:
        with _resolving:
            found = _resolved.get(target)
            if found is None:
                found = _resolved[target] = _resolve(target)
    return found


def resolved(target: Target) -> Library | Unavailable | None:
    """What `library` found, or None before its first call; for tracing, which must not start a build."""
    return _resolved.get(target)


def is_built_ahead(target: Target) -> bool:
    """Whether the package carries the library, for these sources or others."""
    return (PREBUILT / target.name).is_dir()


def recorded_compiler(library: Library) -> str:
    """The compiler that made a library."""
    return cache.recorded_key(library.path.parent)["compiler"]


def build(target: Target, into: Path | None = None) -> Path:
    """Build ahead of time, or raise BuildError; returns the library's path.

    Args:
        into: the folder that gets the entry `<target.name>/`: fusedres/prebuilt in a package. Without it, the
            user's cache, where a library that is there already is kept.
    """
    try:
        _require_linux()
        return _cached(target, jit=True, on_purpose=True).path if into is None else _build_into(target, into)
    except BuildError:
        raise
    except Exception as error:
        raise BuildError(_sentence(error)) from error


def prune(targets: Sequence[Target]) -> list[Path]:
    """Remove the entries of older keys from the user's cache, what killed builds left behind too; returns the entries.

    Other environments that share the cache lose theirs as well, and build them again when they need them.
    """

    def old(root: Path) -> list[Path]:
        entries = cache.entries(root)
        kept = current(entries, targets)
        return [entry for entry in entries if entry not in kept]

    return _remove(old)


def clear() -> list[Path]:
    """Remove all that is in the user's cache: every entry, what tuning found, notes of builds that failed."""
    return _remove(lambda root: [*cache.entries(root), *cache.tables(root), *cache.failures(root)])


def _remove(chosen: Callable[[Path], list[Path]]) -> list[Path]:
    root = cache.location()
    if not root.exists():
        return []
    cache.open_private(root)
    waiting = Progress(f"waiting for another process, which builds in {root}", 0)
    with cache.locked(root, waiting.update):
        cache.remove_leftovers(root)
        found = chosen(root)
        for path in found:
            cache.discard(path)
    return found


def current(entries: Sequence[Path], targets: Sequence[Target]) -> set[Path]:
    """Those of the cache's entries that this environment loads; all of a target's where its compiler is missing."""
    found: set[Path] = set()
    for target in targets:
        try:
            name = entry_name(target)
        except BuildError:
            found.update(entry for entry in entries if entry.name.startswith(f"{target.name}-"))
        else:
            found.update(entry for entry in entries if entry.name == name)
    return found


def entry_name(target: Target) -> str:
    """The folder in the user's cache that this environment builds into."""
    return _entry_name(key(target, target.find()))


def _entry_name(wanted: Key) -> str:
    return f"{wanted.target}-{wanted.digest()[:20]}"


def _resolve(target: Target) -> Library | Unavailable:
    try:
        _require_linux()
        _require_wanted()
        jit = os.environ.get("FUSEDRES_DISABLE_JIT", "0") in ("", "0")
        return _prebuilt(target) or _cached(target, jit=jit)
    except Refused as error:
        _warn(str(error))
        return Unavailable(str(error))
    except Exception as error:  # the reference backend serves, whatever is wrong with the machine
        return Unavailable(_sentence(error))


def _sentence(error: Exception) -> str:
    if isinstance(error, (BuildError, Refused, TimeoutError)):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename or 'the cache'} can't be used: {error.strerror}; set FUSEDRES_CACHE"
    return f"the compiled library can't be built: {type(error).__name__}: {error}"


def _warn(message: str) -> None:
    try:
        warnings.warn(f"fusedres: {message}", RuntimeWarning, stacklevel=2)
    except RuntimeWarning:  # under python -W error too, an op must not fail for the state of a cache
        compiler.notice(f"fusedres: {message}\n")


def _require_linux() -> None:
    if sys.platform != "linux":
        raise BuildError(f"the compiled library is built on Linux only, and this is {sys.platform}")


def _require_wanted() -> None:
    choice = os.environ.get("FUSEDRES_BUILD") or "auto"
    if choice not in BUILD_CHOICES:
        raise BuildError(f"FUSEDRES_BUILD must be one of {', '.join(BUILD_CHOICES)}; got {choice!r}")
    if choice == "none":
        raise BuildError("FUSEDRES_BUILD=none turns the compiled library off; unset it")


def _prebuilt(target: Target) -> Library | None:
    """The library that ships in the package, if it was made from the sources that ship with it."""
    entry = PREBUILT / target.name
    if not entry.is_dir():
        return None
    try:
        recorded = cache.recorded_key(entry)
        here = asdict(key(target, None))
        if any(recorded.get(name) != here[name] for name in PORTABLE_FIELDS):
            return None
        path = cache.verified(entry)
        _load(target, path, "the cache is used instead")
    except (Refused, BuildError) as error:
        _warn(f"{error}; reinstall fusedres")
        return None
    return Library(path, "built ahead")


def _cached(target: Target, *, jit: bool, on_purpose: bool = False) -> Library:
    """The library in the user's cache, built there first if it is missing and `jit` allows it.

    A build that failed is not tried again for a while, unless on purpose.
    """
    root = cache.open_private(cache.location())
    if os.statvfs(root).f_flag & os.ST_NOEXEC:
        raise BuildError(f"nothing can be loaded from {root}, which is mounted noexec; set FUSEDRES_CACHE")
    try:
        chosen = target.find()
    except BuildError:
        path = _from_any_compiler(root, key(target, None))
        if path is None:
            raise
    else:
        wanted = key(target, chosen)
        entry = root / _entry_name(wanted)
        path, fault = _usable(entry)
        if path is None:
            if not jit:
                raise BuildError(f"{fault}, and FUSEDRES_DISABLE_JIT is set; run `python -m fusedres build`")
            return _build_once(target, chosen, wanted, entry, on_purpose=on_purpose)
    return _load_cached(target, path)


def _load_cached(target: Target, path: Path) -> Library:
    _load(target, path, f"remove {path.parent} to build it again")
    return Library(path, "cached")


def _from_any_compiler(root: Path, wanted: Key) -> Path | None:
    """An earlier build that differs in nothing but the compiler, for a machine that has none any more."""
    for entry in sorted(root.glob(f"{wanted.target}-*")):
        path, _ = _usable(entry)
        if path is not None and {**cache.recorded_key(entry), "compiler": wanted.compiler} == asdict(wanted):
            return path
    return None


def _usable(entry: Path) -> tuple[Path | None, str]:
    """The entry's library, or what is wrong with it."""
    if not os.path.lexists(entry):
        return None, "the library is not built yet"
    try:
        return cache.verified_private(entry), ""
    except (Refused, OSError) as error:
        return None, str(error)


def _build_once(target: Target, chosen: Compiler, wanted: Key, entry: Path, *, on_purpose: bool) -> Library:
    """Build into the cache, unless another process did so, or failed to, while this one waited for the lock."""
    root = entry.parent
    waiting = Progress(f"waiting for another process, which builds {target.name} in {root}", 0)
    with cache.locked(root, waiting.update):
        cache.remove_leftovers(root)
        path, fault = _usable(entry)
        if path is not None:
            return _load_cached(target, path)
        reason = None if on_purpose else cache.recent_failure(entry)
        if reason is not None:
            raise BuildError(f"{reason}; tried less than 10 minutes ago, `python -m fusedres build` tries again now")
        if os.path.lexists(entry):
            _warn(f"{fault}; the library is built again")
        try:
            _publish(target, chosen, wanted, entry)
        except BuildError as error:
            cache.remember_failure(entry, str(error))
            if not on_purpose:
                _warn(f"{error}; the reference backend serves")
            raise
        cache.forget_failure(entry)
    return Library(entry / target.file, "built now")


def _publish(target: Target, chosen: Compiler, wanted: Key, entry: Path) -> None:
    """Build in a temporary folder of the cache and move what loads into place."""
    with cache.temporary(entry.parent) as temporary:
        folder = _make_entry(target, chosen, wanted, temporary)
        # Before it is published: every later process would find one that does not load.
        _load(target, folder / target.file, "set CXX to another compiler")
        cache.publish(folder, entry)


def _build_into(target: Target, into: Path) -> Path:
    chosen = target.find()
    into = into.absolute()  # the compiler runs in a directory of its own
    into.mkdir(parents=True, exist_ok=True)
    with cache.temporary(into) as temporary:
        folder = _make_entry(target, chosen, key(target, chosen), temporary)
        cache.publish(folder, into / target.name)
    return into / target.name / target.file


def _make_entry(target: Target, chosen: Compiler, wanted: Key, temporary: Path) -> Path:
    """Compile and link in `temporary`; returns the sealed folder."""
    compilations, link = steps(target, chosen, temporary)
    title = f"building {target.name}, once, in {temporary.parent} ({len(compilations)} files)"
    progress = Progress(title, len(compilations) + 1)
    compiler.run_all(compilations, temporary, progress)
    compiler.run_all([link], temporary, progress)
    folder = temporary / "entry"
    folder.mkdir()
    link.output.replace(folder / target.file)
    cache.seal(folder, target.file, asdict(wanted))
    return folder


def _load(target: Target, path: Path, remedy: str) -> None:
    if target.links_torch:
        import torch  # noqa: F401  the symbols that the library needs
    try:
        ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_LOCAL)
    except OSError as error:
        raise BuildError(f"the compiled library does not load: {error}; {remedy}") from error

"""The per-user cache: a directory only its owner can write, locks that die with their holder, sealed entries, tables.

An entry is a folder with a file and `manifest.json`, which records the file's sha256 and the key that it was
made for. It appears complete, in one rename, and is verified each time before it is used. A table is a
JSON file of what tuning found.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

MANIFEST = "manifest.json"
TEMPORARY_PREFIX = "tmp-"
FAILURE_PREFIX = "failed-"
TABLE_PREFIX = "tuned-"
BUILD_LOCK, TABLES_LOCK = "lock", "tables.lock"
LOCK_SECONDS = 1800.0
FAILURE_SECONDS = 600.0
POLL_SECONDS = 0.02


class Refused(Exception):  # noqa: N818  it is a verdict
    """The cache, or an entry of it, must not be used; the message says why and what to do."""


def location() -> Path:
    """FUSEDRES_CACHE, or $XDG_CACHE_HOME/fusedres, or ~/.cache/fusedres."""
    chosen = os.environ.get("FUSEDRES_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: a relative path is to be ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "fusedres"


def open_private(root: Path) -> Path:
    """Create `root` for its owner alone, or check that it is so; what is above it is the user's affair."""
    if not hasattr(os, "geteuid"):
        raise Refused(f"the cache must be private, and on {os.name} there is no telling whose {root} is")
    root.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        root.mkdir(mode=0o700)
    except FileExistsError:
        _require_ours(root, stat.S_ISDIR, f"run `chmod 700 {root}` if it is yours, or set FUSEDRES_CACHE")
    return root


def _require_ours(path: Path, is_kind: Callable[[int], bool], remedy: str) -> None:
    status = os.lstat(path)
    if stat.S_ISLNK(status.st_mode):
        fault = "it is a symbolic link"
    elif not is_kind(status.st_mode):
        fault = "it is of the wrong kind"
    elif status.st_uid != os.geteuid():
        fault = f"it belongs to user {status.st_uid} and not to user {os.geteuid()}"
    elif status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        fault = f"others may write to it (mode {stat.S_IMODE(status.st_mode):04o})"
    else:
        return
    raise Refused(f"the cache must be private, and {path} is not: {fault}; {remedy}")


@contextmanager
def locked(root: Path, waiting: Callable[[], None], name: str = BUILD_LOCK) -> Iterator[None]:
    """Hold a lock of the cache. The kernel releases it when the process dies, however it dies.

    Args:
        waiting: called again and again while another process holds the lock.
        name: BUILD_LOCK, which a build holds for minutes, or TABLES_LOCK, which who writes a table holds for that.
    """
    path = root / name
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    _held.add(descriptor)
    try:
        _acquire(descriptor, path, waiting)
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


def _acquire(descriptor: int, path: Path, waiting: Callable[[], None]) -> None:
    import fcntl  # absent on Windows, where this module is imported but nothing is built

    started = time.monotonic()
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            pass
        if time.monotonic() - started > LOCK_SECONDS:
            raise TimeoutError(f"another process has held {path} for {LOCK_SECONDS:.0f} s; end it")
        waiting()
        time.sleep(POLL_SECONDS)


_held: set[int] = set()


def _forget_held() -> None:
    # A forked child shares the lock's open file: it would keep the lock after its parent's death.
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_held)


@contextmanager
def temporary(root: Path) -> Iterator[Path]:
    """A private folder in `root`, from where things can be renamed into place; gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=root))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(root: Path) -> None:
    """Remove the temporary folders of killed builds; only under the lock, where nobody else has one."""
    for folder in root.glob(f"{TEMPORARY_PREFIX}*"):
        shutil.rmtree(folder, ignore_errors=True)


def remember_failure(entry: Path, reason: str) -> None:
    """Note why `entry` could not be made, as well as a full disk permits."""
    with suppress(OSError):
        _failure(entry).write_text(reason)


def recent_failure(entry: Path) -> str | None:
    """Why `entry` could not be made, if that was tried in the last FAILURE_SECONDS."""
    with suppress(OSError):
        if time.time() - _failure(entry).stat().st_mtime < FAILURE_SECONDS:
            return _failure(entry).read_text()
    return None


def forget_failure(entry: Path) -> None:
    _failure(entry).unlink(missing_ok=True)


def _failure(entry: Path) -> Path:
    return entry.with_name(f"{FAILURE_PREFIX}{entry.name}")


def failures(root: Path) -> list[Path]:
    """The notes of what could not be made."""
    return [note for note in root.glob(f"{FAILURE_PREFIX}*") if note.is_file()]


def digest(path: Path) -> str:
    """The sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def seal(folder: Path, file: str, key: Mapping[str, str]) -> None:
    """Turn a folder that holds `file` into an entry."""
    path = folder / file
    path.chmod(0o644)  # the umask may have let a group write
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"file": file, "sha256": digest(path), "key": dict(key)}, indent=1) + "\n")
    manifest.chmod(0o644)


def publish(folder: Path, entry: Path) -> None:
    """Move a sealed folder to `entry` in one step; what stood there goes."""
    folder.chmod(0o755)
    discard(entry)
    os.replace(folder, entry)


def discard(entry: Path) -> None:
    """Remove an entry, whatever it has become."""
    if entry.is_symlink() or entry.is_file():
        entry.unlink()
    elif entry.exists():
        shutil.rmtree(entry)


def entries(root: Path) -> list[Path]:
    """The entries in a cache, of every key, each a folder with a manifest."""
    return sorted(manifest.parent for manifest in root.glob(f"*/{MANIFEST}") if not manifest.parent.is_symlink())


def table(root: Path, device: str) -> Path:
    """The file of what tuning found for a device."""
    return root / f"{TABLE_PREFIX}{re.sub('[^A-Za-z0-9]+', '-', device)}.json"


def tables(root: Path) -> list[Path]:
    """What tuning found, a file for each device."""
    return sorted(path for path in root.glob(f"{TABLE_PREFIX}*.json") if path.is_file() and not path.is_symlink())


def size(kept: Path) -> int:
    """The bytes of a table, or of an entry's files."""
    return sum(part.lstat().st_size for part in (kept.iterdir() if kept.is_dir() else [kept]))


def recorded_key(entry: Path) -> dict[str, str]:
    """The key that an entry was made for."""
    return _manifest(entry)["key"]


def verified(entry: Path) -> Path:
    """The entry's file, after its digest was compared with the manifest's."""
    manifest = _manifest(entry)
    path = entry / manifest["file"]
    try:
        actual = digest(path)
    except OSError as error:
        raise Refused(f"the cached {path} can't be read ({error.strerror})") from error
    if actual != manifest["sha256"]:
        raise Refused(f"{path} is not what was built: its sha256 differs from that in {MANIFEST}")
    return path


def verified_private(entry: Path) -> Path:
    """`verified`, where nobody but the owner may have touched any part of the entry."""
    remedy = "it is not used"
    _require_ours(entry, stat.S_ISDIR, remedy)
    for part in entry.iterdir():
        _require_ours(part, stat.S_ISREG, remedy)
    return verified(entry)


def _manifest(entry: Path) -> dict:
    try:
        manifest = json.loads((entry / MANIFEST).read_text())
        file, sha256, key = manifest["file"], manifest["sha256"], manifest["key"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refused(f"{entry / MANIFEST} can't be read ({type(error).__name__})") from error
    if not (isinstance(file, str) and os.path.basename(file) == file and isinstance(key, dict)):
        raise Refused(f"{entry / MANIFEST} is not a manifest")
    return {"file": file, "sha256": sha256, "key": key}

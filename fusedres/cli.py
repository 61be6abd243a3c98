"""The commands of `python -m fusedres`; what they do is in `machine`, `doctor` and `bench`."""

from __future__ import annotations

import traceback
from typing import Annotated

import typer
from rich.console import Console

from fusedres import build, cache, commands
from fusedres.native_sources import NATIVE

INTERRUPTED = 130

app = typer.Typer(
    help="Fused residual blocks for PyTorch: what this machine has, whether it works, and how fast it is.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(highlight=False, soft_wrap=True)
_settings = {"debug": False}


@app.callback()
def settings(debug: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False) -> None:
    _settings["debug"] = debug


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="The same for programs.")] = False) -> None:
    """Versions, devices, instruction sets, caches, and which backend serves which op."""
    raise typer.Exit(commands.info(as_json=as_json))


@app.command()
def doctor() -> None:
    """Try every op on every backend against fp64, and say how to mend what is missing."""
    raise typer.Exit(commands.doctor())


@app.command("build")
def compile_library() -> None:
    """Compile the native library now instead of at first use."""
    raise typer.Exit(commands.build())


@app.command("cache")
def show_cache(
    prune: Annotated[bool, typer.Option(help="Remove what was built for older sources, compilers or torches.")] = False,
    clear: Annotated[bool, typer.Option(help="Remove everything that was built.")] = False,
) -> None:
    """Where compiled libraries are kept, how large they are; remove old ones, or all."""
    if prune or clear:
        removed = build.prune(NATIVE, keep_current=not clear)
        console.print(f"removed {len(removed)} of the cache's entries")
    root = cache.location()
    kept = cache.entries(root) if root.is_dir() else []
    console.print(f"{root}: {len(kept)} entries, {sum(map(cache.size, kept)) / 2**20:.1f} MiB")
    for entry in kept:
        console.print(f"  {entry.name}  {cache.size(entry) / 2**20:.1f} MiB")


def main() -> int:
    """Run the command line: errors are one line, and an interrupted command's status is 130."""
    try:
        app(prog_name="python -m fusedres", standalone_mode=True)
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    except Exception as error:
        if _settings["debug"]:
            traceback.print_exc()
        kind = "" if type(error).__module__.startswith("fusedres") else f"{type(error).__name__}: "
        return commands.fail(f"{kind}{error}; --debug before the command shows where")
    return 0

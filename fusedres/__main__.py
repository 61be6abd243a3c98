"""python -m fusedres: what a machine has and whether it works; comparisons and profiles of whole models.

`info`, `doctor` and `build` need nothing but torch. The other commands need the extra `cli`.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from importlib.util import find_spec

from fusedres import commands

CLI_PACKAGES = ("typer", "rich", "matplotlib")


def main() -> int:
    if all(find_spec(package) for package in CLI_PACKAGES):
        from fusedres import cli

        return cli.main()
    parser = argparse.ArgumentParser(prog="python -m fusedres", description="fused residual blocks for PyTorch")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    choices = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    information = choices.add_parser("info", help="versions, devices, caches, and which backend serves which op")
    information.add_argument("--json", action="store_true", help="the same for programs")
    choices.add_parser("doctor", help="try every op on every backend, and say how to mend what is missing")
    building = choices.add_parser("build", help="compile the libraries now instead of at first use")
    names = [library.value for library in commands.LibraryName]
    help = "cpu, cuda or both; by default what this torch can use"
    # Without the empty list argparse would refuse to be given none.
    building.add_argument("library", nargs="*", choices=[*names, []], metavar="LIBRARY", help=help)
    for name in ("bench", "profile", "tune", "cache"):
        choices.add_parser(name, help="needs: pip install 'fusedres[cli]'", add_help=False)
    options, _ = parser.parse_known_args()
    try:
        return run(options)
    except KeyboardInterrupt:
        return commands.fail("interrupted", status=commands.INTERRUPTED)
    except Exception as error:
        if options.debug:
            traceback.print_exc()
        return commands.fail(commands.explain(error))


def run(options: argparse.Namespace) -> int:
    """The commands that need nothing but torch."""
    if options.command == "info":
        return commands.info(as_json=options.json)
    if options.command == "doctor":
        return commands.doctor()
    if options.command == "build":
        return commands.build(options.library)
    return commands.fail(f"{options.command} needs {', '.join(CLI_PACKAGES)}: pip install 'fusedres[cli]'")


if __name__ == "__main__":
    sys.exit(main())

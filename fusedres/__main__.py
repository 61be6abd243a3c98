"""python -m fusedres build: compile the native library now instead of at first use."""

from __future__ import annotations

import argparse
import sys

from fusedres.build import BuildError, build
from fusedres.native_sources import NATIVE


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fusedres", description="fused residual blocks for PyTorch")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser("build", help="compile the native library now instead of at first use")
    parser.parse_args()
    try:
        print(build(NATIVE))  # noqa: T201  what the command is for
    except BuildError as error:
        print(f"fusedres: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Compile the CPU kernels and a driver with AddressSanitizer and UndefinedBehaviorSanitizer, and run them.

    python tests/sanitize/run.py [rounds]

Compiles as often as the library does, so it is no part of the ordinary tests: `make test-san`. The tile unit is
emulated: the sanitizers don't see what its instructions read and write.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fusedres import compiler
from fusedres.native_sources import COMMON_FLAGS, CSRC, NATIVE, PLAIN

SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1")
DRIVER = Path(__file__).with_name("driver.cpp")


def main(rounds: str = "60") -> int:
    argv = (*compiler.find().argv, f"-I{CSRC}", *COMMON_FLAGS, "-DFUSEDRES_EMULATED_TILES")
    with tempfile.TemporaryDirectory() as folder:
        sources = [source for source in NATIVE.sources if source.variant or source.path in PLAIN]
        files = [(CSRC / source.path, source.flags) for source in sources] + [(DRIVER, ())]

        def compiled(numbered: tuple[int, tuple[Path, tuple[str, ...]]]) -> str:
            number, (path, flags) = numbered
            output = f"{folder}/{number}.o"
            # -O1: the reports name lines, and the sanitizers cost less to compile.
            subprocess.run([*argv, *flags, "-O1", *SANITIZERS, "-c", str(path), "-o", output], check=True)
            return output

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            objects = list(pool.map(compiled, enumerate(files)))
        program = f"{folder}/driver"
        subprocess.run([*argv, *SANITIZERS, "-pthread", *objects, "-o", program], check=True)
        environment = {**os.environ, "UBSAN_OPTIONS": "print_stacktrace=1"}
        return subprocess.run([program, rounds], env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

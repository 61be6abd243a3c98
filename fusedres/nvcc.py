"""The CUDA compiler: which one, with which host compiler, and for which GPUs.

    CUDA_HOME                     the toolkit; else nvcc on PATH, else /usr/local/cuda
    FUSEDRES_CUDA_ARCHITECTURES   what to build for, such as "80 90a", or "all"; by default this machine's GPUs, or
                                  all where it has none

PTX for the oldest one is always there: a GPU that is not on the list runs it, after a compilation by the driver.
"""

from __future__ import annotations

import os
import re
import shutil

from fusedres import compiler
from fusedres.compiler import BuildError, Compiler

ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")
OLDEST_RELEASE = (12, 4)


def find() -> Compiler:
    """nvcc with the host compiler that compiler.find would choose."""
    nvcc, host = _nvcc(), compiler.find()
    argv = (nvcc, "-forward-unknown-to-host-compiler", "-ccbin", host.argv[0])
    found = release(nvcc)
    if found < OLDEST_RELEASE:
        needed = ".".join(map(str, OLDEST_RELEASE))
        raise BuildError(
            f"the CUDA sources need nvcc {needed} or later, and {nvcc} is {found[0]}.{found[1]}; update it"
        )
    codes = tuple(f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures(nvcc))
    ptx = f"-gencode=arch=compute_{ARCHITECTURES[0]},code=compute_{ARCHITECTURES[0]}"
    return Compiler((*argv, *codes, ptx), f"release {found[0]}.{found[1]}, {host.version}")


def release(nvcc: str | None = None) -> tuple[int, int]:
    """The toolkit's version, major and minor."""
    nvcc = nvcc or _nvcc()
    for line in compiler.output((nvcc, "--version")):
        found = re.search(r"release (\d+)\.(\d+)", line)
        if found:
            return int(found[1]), int(found[2])
    raise BuildError(f"`{nvcc} --version` names no release; set CUDA_HOME")


def architectures(nvcc: str) -> list[str]:
    """Those to build for, of what this nvcc can compile."""
    chosen = os.environ.get("FUSEDRES_CUDA_ARCHITECTURES", "").split()
    unknown = [a for a in chosen if a not in (*ARCHITECTURES, "all")]
    if unknown:
        choices = ", ".join((*ARCHITECTURES, "all"))
        raise BuildError(f"FUSEDRES_CUDA_ARCHITECTURES must be of {choices}; got {' '.join(unknown)!r}")
    wanted = ARCHITECTURES if "all" in chosen else chosen or _present() or ARCHITECTURES
    possible = {line.strip().removeprefix("sm_") for line in compiler.output((nvcc, "--list-gpu-code"))}
    return [a for a in ARCHITECTURES if a in wanted and a.rstrip("a") in possible]


def _present() -> set[str]:
    """The architectures of this machine's GPUs; none where its driver has no word for them."""
    if shutil.which("nvidia-smi") is None:
        return set()
    try:
        lines = compiler.output(("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"))
    except BuildError:
        return set()
    found = {line.strip().replace(".", "") for line in lines}
    return {a for a in ARCHITECTURES if a.rstrip("a") in found}


def _nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    places = [os.path.join(home, "bin", "nvcc")] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    for place in places:
        path = shutil.which(place)
        if path:
            return os.path.abspath(path)
    raise BuildError(f"there is no CUDA compiler: {places[0]} is not there; install the CUDA toolkit or set CUDA_HOME")

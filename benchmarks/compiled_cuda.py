"""What nvcc makes of the CUDA kernels: registers, stack, 128-bit accesses. Needs nvcc and cuobjdump, and no GPU.

python benchmarks/compiled_cuda.py docs/compiled_cuda.md
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fusedres import compiler, nvcc
from fusedres.compiler import Progress, Step
from fusedres.native_sources import CSRC, CUDA_ELEMENTS, CUDA_FLAGS, cuda_kernels
from fusedres.target import Source

# Spills and local memory are errors too.
STRICT = ("-Werror=all-warnings", "-Xptxas=-warn-spills,-warn-lmem-usage,-Werror")
# All architectures for the type that trains; the others differ from it in conversions alone.
EVIDENCE = tuple(
    (element, architecture)
    for element in CUDA_ELEMENTS
    for architecture in (nvcc.ARCHITECTURES if element == "BFloat16" else ("90a",))
)
KINDS = ("plain", "projection", "any")
ORDERS = ("contiguous", "channels_last")
FLOAT_ATOMIC = r"\b(?:ATOMG?|ATOMS|REDG?)\.\S*\bB?F\d+"
MANGLED = re.compile(r"(forward|backward)_kernelILNS\w*?4KindE(\d)E\w*?Li(\d)ELNS\w*?5OrderE(\d)E")


@dataclass(frozen=True)
class Kernel:
    """One instantiation on one architecture.

    Args:
        name: "forward plain, channels_last, packs of 8".
        loads, stores: 128-bit accesses to global memory in its code.
        local: accesses to local memory in its code.
        float_atomics: atomic additions of floating-point numbers; a grid barrier counts with integers.
    """

    element: str
    architecture: str
    name: str
    registers: int
    stack: int
    loads: int
    stores: int
    local: int
    float_atomics: int


def cuobjdump() -> str | None:
    """The tool, from the toolkit or from Triton's package."""
    found = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    for folder in triton.submodule_search_locations or () if triton else ():
        found = found or shutil.which("cuobjdump", path=f"{folder}/backends/nvidia/bin")
    return found


def compile_all(
    wanted: Iterable[tuple[str, str]], folder: Path, flags: tuple[str, ...] = STRICT
) -> dict[tuple[str, str, str], Path]:
    """A cubin for each (element, architecture) and file."""
    argv = [word for word in nvcc.find().argv if not word.startswith("-gencode")]
    steps, cubins = [], {}
    for element, architecture in wanted:
        for source in cuda_kernels((element,)):
            stem = Path(source.path).stem
            output = folder / f"{stem}-{element}-{architecture}.cubin"
            cubins[stem, element, architecture] = output
            steps.append(
                Step(f"{stem} {element} {architecture}", _command(argv, source, architecture, output, flags), output)
            )
    compiler.run_all(steps, folder, Progress(f"compiling {len(steps)} files for the GPU", len(steps)))
    return cubins


def _command(
    argv: list[str], source: Source, architecture: str, output: Path, flags: tuple[str, ...]
) -> tuple[str, ...]:
    code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    flags = (*CUDA_FLAGS, *source.flags, *flags, f"-I{CSRC}", code)
    return (*argv, *flags, "-cubin", str(CSRC / source.path), "-o", str(output))


def kernels(wanted: Iterable[tuple[str, str]], tool: str) -> Iterator[Kernel]:
    """Every instantiation, compiled and taken apart."""
    with tempfile.TemporaryDirectory() as folder:
        for (_, element, architecture), cubin in compile_all(wanted, Path(folder)).items():
            usage = _run(tool, "-res-usage", cubin)
            found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage)
            code = dict(re.findall(r"Function : (\S+)\n(.*?)(?=Function : |\Z)", _run(tool, "-sass", cubin), re.DOTALL))
            for function, registers, stack in found:
                text = code[function]
                loads, stores, local, atomics = (
                    len(re.findall(pattern, text))
                    for pattern in (r"\bLDG\.\S*128", r"\bSTG\.\S*128", r"\b(?:LDL|STL)\b", FLOAT_ATOMIC)
                )
                name = describe(function)
                yield Kernel(element, architecture, name, int(registers), int(stack), loads, stores, local, atomics)


def describe(function: str) -> str:
    """A kernel's mangled name in words."""
    found = MANGLED.search(function)
    if found is None:
        return "gate gradient"
    direction, kind, pack, order = found.groups()
    return f"{direction} {KINDS[int(kind)]}, {ORDERS[int(order)]}, packs of {pack}"


def _run(tool: str, option: str, cubin: Path) -> str:
    return subprocess.run([tool, option, str(cubin)], capture_output=True, text=True, check=True).stdout


def table(found: list[Kernel], version: str) -> Iterator[str]:
    """The page."""
    yield from (
        "# What nvcc makes of the CUDA kernels",
        "",
        f"Generated by `make compiled-cuda`, nvcc {version}: compiled, not run. Blocks have 512 threads, which leaves",
        "128 registers a thread. `plain`: the residual as it is, no gate, identity or ReLU; `projection`: the residual",
        "with a norm of its own; `any`: gates and the other activations. Loads and stores are those of 128 bits to",
        "global memory in the code for sm_90a. Speed: not measured.",
        "",
    )
    spilling = [k for k in found if k.stack or k.local]
    yield f"{len(found)} kernels, {len(spilling)} of them with a stack frame or accesses to local memory."
    for element in CUDA_ELEMENTS:
        rows = [k for k in found if k.element == element]
        architectures = [a for a in nvcc.ARCHITECTURES if any(k.architecture == a for k in rows)]
        if not architectures:
            continue
        columns = [f"sm_{a}" for a in architectures]
        yield from ("", f"## {element}", "")
        yield f"| kernel | registers: {' | '.join(columns)} | 128-bit loads | stores |"
        yield f"|---|{'---:|' * (len(columns) + 2)}"
        for name in sorted({k.name for k in rows}):
            of_name = {k.architecture: k for k in rows if k.name == name}
            last = of_name["90a"]
            registers = " | ".join(str(of_name[a].registers) for a in architectures)
            yield f"| {name} | {registers} | {last.loads} | {last.stores} |"


def version() -> str:
    return ".".join(map(str, nvcc.release()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    page = parser.parse_args().page
    tool = cuobjdump()
    if tool is None:
        sys.exit("cuobjdump is not here: it comes with the CUDA toolkit and with Triton (pip install triton)")
    page.write_text("\n".join(table(list(kernels(EVIDENCE, tool)), version())) + "\n")


if __name__ == "__main__":
    main()

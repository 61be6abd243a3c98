"""csrc/cuda compiled for the host: the same kernels and binding, over a small stand-in for CUDA in tests/emulation.

What it shows: what each thread computes and where it reads and writes, partial results and their merging, tails,
masks, alignments, layouts, what stays on chip and what is read again, and a missing barrier between blocks, as each
runs alone as far as it can. What it can't show: races and missing barriers within a block, memory models, launch limits
and speed; for those there is compute-sanitizer, on a GPU.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from fusedres.backends import Backend, cuda
from fusedres.native_sources import COMMON_FLAGS, CSRC, cuda_bindings, cuda_kernels
from fusedres.target import Source, Target

FOLDER = Path(__file__).parent / "emulation"
THREADS = 64  # of a block, where a GPU has 512: two warps are enough to go wrong


def _digest() -> str:
    headers = sorted(path for path in FOLDER.rglob("*.h"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in headers)).hexdigest()[:16]


def target() -> Target:
    as_cpp = ("-x", "c++")
    sources = (
        *(Source(s.path, (*as_cpp, *s.flags), s.variant) for s in cuda_kernels()),
        *(Source(s.path, (*as_cpp, *s.flags)) for s in cuda_bindings("fusedres_emulated", "CPU")),
        Source("../tests/emulation/device.cpp", ("-DUSE_CUDA",)),
    )
    flags = (
        *COMMON_FLAGS,
        "-O2",
        "-Wno-unknown-pragmas",
        "-ffp-contract=fast",
        "-DFUSEDRES_ISA=portable",
        f"-DFUSEDRES_CUDA_THREADS={THREADS}",
        f"-DFUSEDRES_EMULATION={_digest()}",  # the builder's key knows csrc only
        f"-I{FOLDER}",
    )
    # -Bsymbolic: device.cpp's functions are taken before torch's.
    return Target("emulated", CSRC, sources, flags=flags, link_flags=("-Wl,-Bsymbolic",))


BACKEND = Backend("emulated", cuda.operand_objection, keys=("CPU",), ops=cuda.OPS)

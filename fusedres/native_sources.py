"""What the native library is compiled from, and how: data for whoever builds it.

Every file of KERNELS is compiled once per variant, with `-DFUSEDRES_ISA=<variant>` and the variant's flags; every other
file once. All paths are relative to the folder `csrc`.
"""

from __future__ import annotations

import platform
from pathlib import Path

from fusedres.target import Source, Target

COMMON_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
)

KERNELS = (
    "cpu/affine_act.cpp",
    "cpu/apply.cpp",
    "cpu/backward.cpp",
    "cpu/batch_norm.cpp",
    "cpu/bn_act.cpp",
    "cpu/bn_act_pool.cpp",
    "cpu/gradient_apply.cpp",
    "cpu/gradient_sums.cpp",
    "cpu/pool_apply.cpp",
    "cpu/pool_gradients.cpp",
    "cpu/statistics.cpp",
)

_AVX512_FLAGS = (
    "-mavx512f",
    "-mavx512bw",
    "-mavx512dq",
    "-mavx512vl",
    "-mfma",
    "-mf16c",
    "-mprefer-vector-width=512",
)
_X86_VARIANTS = {
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": _AVX512_FLAGS,
    "avx512_bf16": (*_AVX512_FLAGS, "-mavx512bf16"),
}
# -O2: without vector instructions unrolling makes the code long and not faster.
VARIANTS = {"portable": ("-O2",), **(_X86_VARIANTS if platform.machine() in ("x86_64", "AMD64") else {})}

PLAIN = ("cpu/arena.cpp", "cpu/facts.cpp", "cpu/isa.cpp")

# These include torch's headers, those of the stable ABI.
BINDINGS = ("bindings/operands.cpp", "bindings/ops.cpp", "bindings/tensors.cpp")

_PACKAGE = Path(__file__).parent
# A wheel carries the sources in the package; in a checkout they stand beside it.
CSRC = _PACKAGE / "csrc" if (_PACKAGE / "csrc").is_dir() else _PACKAGE.parent / "csrc"


def _sources() -> tuple[Source, ...]:
    kernels = [
        Source(path, (f"-DFUSEDRES_ISA={variant}", *flags), variant)
        for path in KERNELS
        for variant, flags in VARIANTS.items()
    ]
    return (*kernels, *(Source(path) for path in (*PLAIN, *BINDINGS)))


NATIVE = Target("native", CSRC, _sources(), flags=COMMON_FLAGS)

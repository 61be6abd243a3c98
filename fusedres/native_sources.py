"""What the native library is compiled from, and how: data for whoever builds it.

Every file of KERNELS is compiled once per variant, with `-DFUSEDRES_ISA=<variant>` and the variant's flags; every other
file once. All paths are relative to the folder `csrc`.
"""

from __future__ import annotations

import platform

COMMON_FLAGS = (
    "-std=c++17",
    "-O3",
    "-g0",
    "-fPIC",
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
    "cpu/bn_act.cpp",
    "cpu/gradient_apply.cpp",
    "cpu/gradient_sums.cpp",
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

PLAIN = ("cpu/arena.cpp", "cpu/isa.cpp")

# These include torch's headers: stable ABI, so that one binary serves every torch from 2.11 on.
BINDINGS = ("bindings/ops.cpp", "bindings/tensors.cpp")
BINDINGS_FLAGS = ("-DTORCH_TARGET_VERSION=0x020b000000000000",)

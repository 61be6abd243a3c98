"""What the compiled libraries are made from, and how: data for whoever builds them.

Every file of KERNELS and CONVOLUTION_KERNELS is compiled once per variant, with `-DFUSEDRES_ISA=<variant>` and the
variant's flags; those of FLOAT_KERNELS likewise, but not for variants that serve bfloat16 alone; every other file once.
The variant that widens has the files of CONVOLUTION_KERNELS alone, the tile unit's those of TILE_KERNELS. All paths are
relative to the folder `csrc`.
"""

from __future__ import annotations

import platform
from pathlib import Path

from fusedres import nvcc
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
    "cpu/head.cpp",
    "cpu/max_pool.cpp",
    "cpu/pool_apply.cpp",
    "cpu/pool_gradients.cpp",
    "cpu/statistics.cpp",
)
CONVOLUTION_KERNELS = (
    "cpu/conv_act.cpp",
    "cpu/conv_block.cpp",
    "cpu/conv_winograd.cpp",
    "cpu/conv_dweight.cpp",
    "cpu/conv_dweight_winograd.cpp",
)
FLOAT_KERNELS = ("cpu/conv_repack.cpp",)

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
# Its instructions are in assembly; other convolutions are avx512_widened's, and all other kernels avx512_bf16's.
TILE_KERNELS = ("cpu/conv_act.cpp", "cpu/conv_tiles.cpp", "cpu/conv_dweight_tiles.cpp")
TILE_VARIANTS = {"amx": ("-DFUSEDRES_TILES", "-DFUSEDRES_BESIDE_TILES=avx512_widened", *_X86_VARIANTS["avx512_bf16"])}
# Products in float32, and all else as avx512_bf16's.
WIDENED_VARIANTS = {"avx512_widened": ("-DFUSEDRES_WIDENED", *_X86_VARIANTS["avx512_bf16"])}
# -O2: without vector instructions unrolling makes the code long and not faster.
_IS_X86 = platform.machine() in ("x86_64", "AMD64")
KERNEL_VARIANTS = {"portable": ("-O2",), **(_X86_VARIANTS if _IS_X86 else {})}
VARIANTS = ("portable", *(("avx2", "avx512", "avx512_widened", "avx512_bf16", "amx") if _IS_X86 else ()))
_COMPILATIONS = (
    (KERNELS, KERNEL_VARIANTS),
    (CONVOLUTION_KERNELS, {**KERNEL_VARIANTS, **(WIDENED_VARIANTS if _IS_X86 else {})}),
    (FLOAT_KERNELS, {name: flags for name, flags in KERNEL_VARIANTS.items() if name != "avx512_bf16"}),
    (TILE_KERNELS, TILE_VARIANTS if _IS_X86 else {}),
)

PLAIN = ("cpu/arena.cpp", "cpu/conv_pack.cpp", "cpu/facts.cpp", "cpu/isa.cpp", "cpu/product_speed.cpp")

# These include torch's headers, those of the stable ABI: every library's, and the CPU library's alone.
BINDINGS = ("bindings/operands.cpp", "bindings/tensors.cpp")
CPU_BINDINGS = ("bindings/bn_act_pool.cpp", "bindings/cpu.cpp", "bindings/head.cpp", "bindings/max_pool.cpp")
CONVOLUTIONS = (
    "bindings/conv_act.cpp",
    "bindings/conv_dweight.cpp",
    "bindings/conv_training.cpp",
    "bindings/recording.cpp",
)

CUDA_FLAGS = ("-std=c++17", "-O3", "-fvisibility=hidden", "-Wall", "-Wextra")

# Compiled once per element type, with `-DFUSEDRES_ELEMENT=<type>`.
CUDA_KERNELS = ("cuda/forward.cu", "cuda/backward.cu")
CUDA_ELEMENTS = ("BFloat16", "Half", "float", "double")
CUDA_PLAIN = ("cuda/affine_act.cu", "cuda/bn_act.cu", "cuda/facts.cu")

_PACKAGE = Path(__file__).parent
# A wheel carries the sources in the package; in a checkout they stand beside it.
CSRC = _PACKAGE / "csrc" if (_PACKAGE / "csrc").is_dir() else _PACKAGE.parent / "csrc"


def operators(namespace: str, key: str) -> Source:
    """The file that registers kernels, for a backend's namespace and dispatch key."""
    return Source("bindings/ops.cpp", (f"-DFUSEDRES_NAMESPACE={namespace}", f"-DFUSEDRES_KEY={key}"))


def convolutions(namespace: str) -> tuple[Source, ...]:
    """The files that register the convolutions of a CPU library."""
    return tuple(Source(path, (f"-DFUSEDRES_NAMESPACE={namespace}",)) for path in CONVOLUTIONS)


def _native() -> tuple[Source, ...]:
    kernels = [
        Source(path, (f"-DFUSEDRES_ISA={variant}", *flags), variant)
        for paths, variants in _COMPILATIONS
        for path in paths
        for variant, flags in variants.items()
    ]
    return (
        *kernels,
        *(Source(path) for path in (*PLAIN, *BINDINGS, *CPU_BINDINGS)),
        operators("fusedres_native", "CPU"),
        *convolutions("fusedres_native"),
    )


def cuda_kernels(elements: tuple[str, ...] = CUDA_ELEMENTS) -> tuple[Source, ...]:
    """The CUDA kernels' compilations, one a file and element type."""
    return tuple(
        Source(path, (f"-DFUSEDRES_ELEMENT={element}",), element) for element in elements for path in CUDA_KERNELS
    )


def cuda_bindings(namespace: str, key: str) -> tuple[Source, ...]:
    """All that is not compiled once per element type."""
    # USE_CUDA: torch declares its current stream for those who define it.
    return (
        *map(Source, (*CUDA_PLAIN, *BINDINGS)),
        Source("bindings/cuda.cpp", ("-DUSE_CUDA",)),
        operators(namespace, key),
    )


NATIVE = Target("native", CSRC, _native(), flags=COMMON_FLAGS)
CUDA = Target(
    "cuda",
    CSRC,
    (*cuda_kernels(), *cuda_bindings("fusedres_cuda", "CUDA")),
    flags=CUDA_FLAGS,
    # libtorch brings libtorch_cuda, where there is one.
    link_flags=("-Wl,--no-as-needed", "-ltorch"),
    find=nvcc.find,
)

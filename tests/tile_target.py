"""The tile unit's convolutions (AMX) over an emulated unit, as operators of `fusedres_tiles`.

Where the machine has the other instructions of the real ones, these are compiled with them: then only the unit itself
is another one.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from fusedres import build
from fusedres.backends import native_training  # noqa: F401  (defines the operators of a training step)
from fusedres.backends.native_convolution import SCHEMAS
from fusedres.native_sources import (
    BINDINGS,
    COMMON_FLAGS,
    CONVOLUTION_KERNELS,
    CSRC,
    FLOAT_KERNELS,
    TILE_KERNELS,
    convolutions,
)
from fusedres.native_sources import KERNEL_VARIANTS as VECTOR_VARIANTS
from fusedres.target import Source, Target

_TRAINING = ("conv", "conv_", "conv_dx", "conv_dx_", "conv_dweight")
_EMULATED = ("-DFUSEDRES_ISA=amx", "-DFUSEDRES_TILES", "-DFUSEDRES_EMULATED_TILES", "-DFUSEDRES_BESIDE_TILES=portable")


def _vector_flags() -> tuple[str, ...]:
    has_them = "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    return VECTOR_VARIANTS["avx512_bf16"] if has_them else ()


@cache
def target() -> Target:
    emulated = (*_EMULATED, *_vector_flags())
    beside = (*CONVOLUTION_KERNELS, *FLOAT_KERNELS)
    return Target(
        "tiles",
        CSRC,
        (
            *(Source(path, emulated, "emulated") for path in TILE_KERNELS),
            *(Source(path, ("-DFUSEDRES_ISA=portable",), "portable") for path in beside),
            *map(Source, ("cpu/conv_pack.cpp", "cpu/arena.cpp", *BINDINGS, "../tests/tiles/library.cpp")),
            *convolutions("fusedres_tiles"),
        ),
        flags=(*COMMON_FLAGS, "-O2"),
        # -Bsymbolic: what another loaded library calls by the same name is not this one's.
        link_flags=("-Wl,-Bsymbolic",),
    )


@cache
def _library() -> torch.library.Library:
    library = torch.library.Library("fusedres_tiles", "FRAGMENT")
    native = (str(getattr(torch.ops.fusedres_native, name).default._schema) for name in _TRAINING)
    for schema in (*SCHEMAS, *(text.removeprefix("fusedres_native::") for text in native)):
        library.define(schema)
    return library


def operators():
    """Built and loaded."""
    _library()
    found = build.library(target())
    assert isinstance(found, build.Library), found.reason
    return torch.ops.fusedres_tiles

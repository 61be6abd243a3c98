"""The tile unit's convolutions (AMX): emulated in plain C++, and the instructions that the real ones are.

What this shows: which values each tile holds, borders, tails, copies, what is finished while the next block is
multiplied, every activation. What it can't show: that a machine with the unit computes what the emulation does, and
its speed. The instructions' operands are held to the order that the manual gives, in what was compiled.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import test_native_convolution as convolutions
import tile_target
import torch

from fusedres import compiler
from fusedres.epilogue import CATALOGUE
from fusedres.native_sources import COMMON_FLAGS, CSRC, TILE_VARIANTS, VARIANTS

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("g++") is None, reason="the emulation needs Linux and g++"
)

Shape = convolutions.Shape
SHAPES = (
    *convolutions.DIRECT,
    Shape(32, 64, size=(40, 36), images=1),  # several blocks of rows and of outputs
    Shape(64, 33, (1, 1), (17, 1), padding=(0, 0), images=1),  # one row more than a tile, one output more
    Shape(96, 16, (1, 1), (31, 16), padding=(0, 0), images=1),  # equal distances throughout
    Shape(32, 32, (1, 1), (33, 33), stride=(2, 2), padding=(0, 0)),
    Shape(64, 96, (2, 2), (9, 20), stride=(1, 3), padding=(1, 0)),
)


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    operators = tile_target.operators()
    monkeypatch.setattr(convolutions, "operators", lambda: operators)


@pytest.mark.parametrize("shape", SHAPES, ids=repr)
def test_the_result_is_the_formula_in_fp64(shape):
    convolutions.test_the_result_is_the_formula_in_fp64(shape, torch.bfloat16)
    convolutions.test_the_result_may_take_the_residuals_place(shape, torch.bfloat16)


@pytest.mark.parametrize("act", CATALOGUE, ids=lambda act: act.name)
def test_every_activation(act):
    convolutions.test_every_activation(Shape(32, 40, size=(9, 7)), act, torch.bfloat16)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("shape", [Shape(20, 33, size=(11, 9), images=1), Shape(64, 33, size=(11, 9), images=1)])
def test_values_that_are_not_finite_stay_in_their_windows(shape, value):
    convolutions.test_values_that_are_not_finite_stay_in_their_windows(shape, value, torch.bfloat16)


def test_results_are_the_same_bits_whatever_the_threads():
    shape = Shape(64, 80, size=(30, 29))
    convolutions.test_results_are_the_same_bits_whatever_the_threads(shape, torch.bfloat16)


def test_winograds_form_is_left_to_the_vector_unit():
    shape = Shape(32, 48, size=(9, 8), tile=4)
    convolutions.test_the_result_is_the_formula_in_fp64(shape, torch.bfloat16)


@cache
def instructions(folder: Path, source: str) -> list[str]:
    """What the tile unit is told in a file, compiled as the library has it."""
    output = folder / f"{source}.o"
    (variant, flags), *_ = TILE_VARIANTS.items()
    argv = (*compiler.find().argv, f"-I{CSRC}", *COMMON_FLAGS, f"-DFUSEDRES_ISA={variant}", *flags)
    subprocess.run((*argv, "-c", str(CSRC / f"cpu/{source}.cpp"), "-o", str(output)), check=True)
    printed = subprocess.run(
        ("objdump", "-d", "--no-show-raw-insn", str(output)), check=True, capture_output=True, text=True
    ).stdout
    return re.findall(r"^ +\w+:\s+((?:tile|tdp|ldtile)\S+.*?)\s*$", printed, re.MULTILINE)


@pytest.mark.skipif(shutil.which("objdump") is None, reason="reads machine code: needs objdump")
@pytest.mark.skipif("amx" not in VARIANTS, reason="x86-64 alone has the unit")
@pytest.mark.parametrize("source", ["conv_tiles", "conv_dweight_tiles"])
def test_the_library_has_the_units_instructions(tmp_path_factory, source):
    found = instructions(tmp_path_factory.mktemp("tiles"), source)
    # 2 x 2, 2 x 1, 1 x 2 and 1 x 1 tiles of sums: rows in 4 and 5, weights in 6 and 7, in AT&T's order.
    products = [line.split()[1] for line in found if line.startswith("tdpbf16ps")]
    assert set(products) == {f"%tmm{w},%tmm{x},%tmm{2 * (x - 4) + w - 6}" for x in (4, 5) for w in (6, 7)}
    for x, w in ((4, 6), (4, 7), (5, 6), (5, 7)):
        at = found.index(f"tdpbf16ps %tmm{w},%tmm{x},%tmm{2 * (x - 4) + w - 6}")
        assert any(line.startswith("tileloadd") and line.endswith(f"%tmm{x}") for line in found[:at])
    assert sum(line.startswith("ldtilecfg") for line in found) == sum(line == "tilerelease" for line in found) > 0
    assert {line.split()[1].split(",")[0] for line in found if line.startswith("tilestored")} == {
        f"%tmm{sums}" for sums in range(4)
    }

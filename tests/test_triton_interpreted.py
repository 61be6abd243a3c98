"""The Triton kernels against eager and fp64 without a GPU: in Triton's interpreter, in a process of its own.

TRITON_INTERPRET must be set before a kernel is decorated, and this process may have decorated them already.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fusedres

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@needs_triton
@pytest.mark.parametrize("tests", ["interpreted_kernels.py", "interpreted_convolutions.py"])
def test_the_kernels_equal_the_formula_in_the_interpreter(tests: str, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "TRITON_CACHE_DIR": str(tmp_path),
        "FUSEDRES_TEST_DEVICE": "cpu",
        "PYTHONPATH": str(Path(fusedres.__file__).parents[1]),  # a checkout need not be installed
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests]
    run = subprocess.run(
        command, env=environment, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout

"""What only a GPU shows of the 1x1 convolutions' kernel: its machine code, cut in every way, and in a graph."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fusedres
from fusedres.bench.timing import graphed
from fusedres.ops import conv_act

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from product_cases import CASES, DTYPES, Case, require_every_configuration_within_the_bar


@pytest.fixture(autouse=True)
def gpu(device: str) -> Iterator[None]:
    """float32 is not multiplied as TF32."""
    if device == "cpu":
        pytest.skip("the kernel needs a GPU: FUSEDRES_TEST_DEVICE=cuda")
    settings: Any = torch.backends.cudnn.conv  # pyright: ignore[reportAttributeAccessIssue]
    before, settings.fp32_precision = settings.fp32_precision, "ieee"
    yield
    settings.fp32_precision = before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_configuration_is_within_the_bar(case: Case, dtype: torch.dtype) -> None:
    require_every_configuration_within_the_bar("triton", case, dtype)


@torch.no_grad()
def test_a_captured_call_reads_what_then_lies_in_x() -> None:
    x = torch.randn(8, 64, 28, 28).bfloat16().contiguous(memory_format=torch.channels_last)
    weight = torch.randn(256, 64, 1, 1).bfloat16()
    with fusedres.use_backend("triton"):
        replay = graphed(lambda: conv_act(x, weight))
        x.normal_()
        found, expected = replay(), conv_act(x, weight)
    assert isinstance(found, torch.Tensor) and torch.equal(found, expected)

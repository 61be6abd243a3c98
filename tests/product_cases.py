"""1x1 convolutions that the Triton backend's conv_act is tried on, in the interpreter and on a GPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from test_conv_act import eager, largest, operands, strides
from torch import Tensor

import fusedres
from fusedres.backends.triton import launch
from fusedres.backends.triton.blocking import Blocks, possible, product_of
from fusedres.backends.triton.conv_act import problem_of
from fusedres.ops import conv_act

Case = tuple[tuple[int, int, int, int], int, tuple[int, int]]
# x's sizes, output channels, stride: odd numbers of pixels and of both channels, more than one tile of each, strides
# apart, rows of 2 and of 8, more tiles than a group has
CASES: tuple[Case, ...] = (
    ((2, 64, 9, 7), 32, (1, 1)),
    ((3, 35, 8, 11), 17, (2, 1)),
    ((2, 72, 5, 5), 136, (2, 2)),
    ((1, 130, 6, 5), 24, (1, 1)),
    ((9, 16, 13, 11), 131, (1, 1)),
    ((2, 8, 1, 2), 3, (1, 1)),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def configs(x: Tensor, weight: Tensor, stride: tuple[int, int]) -> list[Blocks]:
    """The declared ones that the device could run on these operands."""
    problem = problem_of(x.shape[0], *weight.shape[:2], x.dtype, stride == (1, 1))
    return possible(product_of(x.dtype), problem, launch.device_of(x.device).capability)


def error_and_bar(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, r: Tensor | None, act: str, stride: tuple[int, int]
) -> tuple[float, float]:
    """In units of the summed terms, against fp64, and 1.1 times eager's."""
    wide = [None if t is None else t.double() for t in (x, weight, bias, r)]
    exact, theirs = (eager(*given, act, {"stride": stride}) for given in (wide, (x, weight, bias, r)))  # pyright: ignore[reportArgumentType]
    terms = F.conv2d(x.double().abs(), weight.double().abs(), stride=stride) + 5
    assert y.dtype == x.dtype and strides(y) == strides(theirs)
    return largest(y, exact, terms), max(1.1 * largest(theirs, exact, terms), 4 * torch.finfo(x.dtype).eps)


def require_every_configuration_within_the_bar(backend: str, case: Case, dtype: torch.dtype) -> None:
    """With and without a bias and a residual in turn."""
    shape, outputs, stride = case
    geometry = {"stride": stride}
    x, weight, bias, residual = operands(shape, (outputs, shape[1], 1, 1), geometry, dtype, "channels_last")
    for index, blocks in enumerate(configs(x, weight, stride)):
        b, r = (None, bias)[index % 2], (residual, residual, None)[index % 3]
        before = residual.clone()
        with fusedres.use_backend(backend), launch.forced(product_of(dtype), blocks):
            y = conv_act(x, weight, b, residual=r, **geometry)
        error, bar = error_and_bar(y, x, weight, b, r, "relu", stride)
        assert error <= bar, str(blocks)
        assert torch.equal(residual, before), "the residual was written to"

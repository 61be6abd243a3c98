"""The cases that tests, benchmarks and users' own backends share; `fusedres.numerics` has the bar they are held to.

A case describes one call of an op, and its seed all tensors of that call.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import math
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres import ops
from fusedres.backends import Affine, Norm, Window
from fusedres.epilogue import find

OPS = ("bn_act", "affine_act")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = ("contiguous", "channels_last", "sliced", "permuted")
VALUES = ("normal", "mean1", "mean1e2", "mean1e4", "mean1e7", "constant", "nonfinite", "denormal")
SHAPES = ((4, 1, 5, 5), (2, 3, 7, 5), (3, 35, 6, 4), (6, 8, 1, 1), (2, 64, 9, 9), (5, 16, 3, 11))
LARGE_SHAPES = ((4, 64, 56, 56), (8, 35, 28, 28), (2, 256, 28, 28))
POOL_SHAPES = ((4, 16, 5, 5), (2, 35, 7, 5), (3, 35, 6, 4), (6, 48, 1, 1), (2, 64, 9, 9), (5, 16, 3, 11))
RESIDUALS = ("none", "plain", "other layout", "stride 0", "projection", "frozen projection")
WINDOWS = (((3, 3), (2, 2), (1, 1)), ((2, 2), (2, 2), (1, 1)), ((3, 2), (1, 3), (1, 1)), ((5, 1), (3, 1), (2, 0)))
GATES = ("none", "sample", "channel", "both", "scalar")


@dataclass(frozen=True)
class Case:
    """One call of one op.

    Args:
        mode: "training" (batch statistics) or "eval" (running ones).
        parameters: "all", "no weights" (affine=False) or "no running statistics".
        window: of bn_act_pool.
    """

    op: str
    dtype: torch.dtype
    layout: str
    shape: tuple[int, ...]
    values: str
    mode: str
    residual: str
    gate: str
    act: str
    parameters: str
    seed: int
    window: Window | None = None

    def group(self) -> tuple[str, ...]:
        """What is pooled: all but shape, residual, gate, activation, window and seed."""
        return self.op, str(self.dtype).removeprefix("torch."), self.layout, self.mode, self.values


def cases(count: int = 2000, *, large: int = 12, seed: int = 0) -> list[Case]:
    """`count` seeded cases, `large` of them of the size of a real layer; every group comes up equally often."""
    generator = random.Random(seed)
    groups = [
        (op, dtype, layout, values, mode)
        for values in VALUES
        for layout in LAYOUTS
        for dtype in DTYPES
        for op in OPS
        for mode in (("training", "eval") if op == "bn_act" else ("eval",))
    ]
    found = []
    for index in range(count):
        op, dtype, layout, values, mode = groups[index % len(groups)]
        is_large = index % max(count // max(large, 1), 1) == 0 and index // max(count // max(large, 1), 1) < large
        found.append(
            Case(
                op=op,
                dtype=dtype,
                layout=layout,
                shape=generator.choice(LARGE_SHAPES if is_large else SHAPES),
                values=values,
                mode=mode,
                residual=generator.choice(RESIDUALS),
                gate=generator.choice(("none", "none", *GATES)),
                # eager's relu6 passes the gradient at a NaN or not, by where the element falls in its vector loop
                act=generator.choice(("relu", "relu", "identity", "leaky_relu", *_others(values))),
                parameters=generator.choice(("all", "all", "no weights", "no running statistics")),
                seed=index,
            )
        )
    return found


def pool_cases(count: int = 2000, *, seed: int = 0) -> list[Case]:
    """`count` seeded cases of bn_act_pool; every group comes up equally often."""
    generator = random.Random(seed)
    groups = list(itertools.product(VALUES, LAYOUTS, DTYPES, ("training", "eval")))
    found = []
    for index in range(count):
        values, layout, dtype, mode = groups[index % len(groups)]
        found.append(
            Case(
                op="bn_act_pool",
                dtype=dtype,
                layout=layout,
                shape=generator.choice(POOL_SHAPES),
                values=values,
                mode=mode,
                residual="none",
                gate="none",
                act=generator.choice(("relu", "relu", "identity")),
                parameters=generator.choice(("all", "all", "no weights", "no running statistics")),
                seed=index,
                window=Window(*generator.choice(WINDOWS)),
            )
        )
    return found


def _others(values: str) -> tuple[str, ...]:
    return ("silu", "gelu") if values == "nonfinite" else ("relu6", "silu", "gelu")


class Operands(NamedTuple):
    """The tensors of one case; those with gradients are leaves."""

    x: Tensor
    norm: Norm
    residual: Tensor | None
    residual_norm: Norm | None
    gate: Tensor | None
    dy: Tensor


def operands(case: Case, device: str | torch.device = "cpu") -> Operands:
    """The case's tensors, from its seed alone."""
    generator = torch.Generator("cpu").manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    n, c, *_ = case.shape
    x = _place(_shift(normal(*case.shape), case.values, generator), case.layout, case.dtype, device)
    residual = None
    if case.residual != "none":
        other = {"contiguous": "channels_last", "channels_last": "contiguous"}.get(case.layout, "contiguous")
        layout = other if case.residual == "other layout" else case.layout
        value = _shift(normal(*case.shape), case.values if "projection" in case.residual else "normal", generator)
        if case.residual == "stride 0":
            residual = value[:1].to(device, case.dtype).expand(case.shape).detach().requires_grad_()
        else:
            residual = _place(value, layout, case.dtype, device)
    gate_shape = {
        "sample": (n, 1, 1, 1),
        "channel": (1, c, 1, 1),
        "both": (n, c, 1, 1),
        "scalar": (1, 1, 1, 1),
    }
    gate = None
    if case.gate != "none":
        gate = (1 + 0.5 * normal(*gate_shape[case.gate])).to(device, case.dtype).requires_grad_()
    norm = _norm(case, normal, x, case.mode == "training")
    residual_norm = None
    if "projection" in case.residual and residual is not None:
        residual_norm = _norm(case, normal, residual, case.mode == "training" and case.residual == "projection")
    sizes = case.shape if case.window is None else (n, c, *case.window.output_size(*case.shape[2:]))
    dy = normal(*sizes).to(device, case.dtype)
    return Operands(x, norm, residual, residual_norm, gate, dy)


def _shift(t: Tensor, values: str, generator: torch.Generator) -> Tensor:
    """Unit normal values made into what the value class is about."""
    if values.startswith("mean"):
        return t + float(values.removeprefix("mean"))
    if values == "constant":
        t[:, ::2] = torch.randn(1, t[:, ::2].shape[1], 1, 1, generator=generator, dtype=t.dtype, device="cpu")
    elif values == "nonfinite":
        flat = t.view(-1)
        for value in (math.nan, math.inf, -math.inf):
            flat[int(torch.randint(flat.numel(), (1,), generator=generator, device="cpu"))] = value
    elif values == "denormal":
        return t * 1e-39
    return t


def _place(t: Tensor, layout: str, dtype: torch.dtype, device: str | torch.device) -> Tensor:
    """A leaf of these values in that memory order."""
    t = t.to(device, dtype)
    if layout == "channels_last":
        t = t.to(memory_format=torch.channels_last)
    elif layout == "sliced":
        t = torch.stack([t, t + 1], dim=2).flatten(1, 2)[:, ::2]
    elif layout == "permuted":
        t = t.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
    return t.detach().requires_grad_()


def _norm(case: Case, normal: Callable[..., Tensor], t: Tensor, training: bool) -> Norm:
    """Parameters in fp32 as under autocast, fp64 for fp64; running statistics near the tensor's own."""
    c = t.shape[1]
    dtype = torch.promote_types(case.dtype, torch.float32)
    weight = (1 + 0.3 * normal(c)).to(t.device, dtype).requires_grad_()
    bias = (0.3 * normal(c)).to(t.device, dtype).requires_grad_()
    centre = t.detach().double().nan_to_num(0.0, 0.0, 0.0).mean((0, 2, 3)).cpu()
    mean = (centre + 0.1 * normal(c)).to(t.device, dtype)
    var = (1 + 0.3 * normal(c)).abs().to(t.device, dtype)
    if case.parameters == "no weights":
        return Norm(None, None, mean, var, training)
    if case.parameters == "no running statistics" and training:
        return Norm(weight, bias, None, None, training)
    return Norm(weight, bias, mean, var, training)


def candidate(case: Case, given: Operands) -> Tensor:
    """The case through `fusedres.ops`, whichever backend is chosen."""
    x, norm, residual, residual_norm, gate, _ = given
    if case.window is not None:
        return ops.bn_act_pool(x, norm, **case.window._asdict(), act=case.act)
    if case.op == "bn_act":
        return ops.bn_act(x, norm, residual=residual, residual_norm=residual_norm, gate=gate, act=case.act)
    affine, residual_affine = _affine(norm), None if residual_norm is None else _affine(residual_norm)
    return ops.affine_act(x, affine, residual=residual, residual_affine=residual_affine, gate=gate, act=case.act)


def eager(case: Case, given: Operands) -> Tensor:
    """The case as an eager network runs it: one function after the other, each rounding to the dtype."""
    x, norm, residual, residual_norm, gate, _ = given
    z = _eager_branch(case, x, norm)
    if gate is not None:
        z = z * gate
    if residual is not None:
        z = z + (residual if residual_norm is None else _eager_branch(case, residual, residual_norm))
    y = find(case.act).formula(z)
    return y if case.window is None else F.max_pool2d(y, *case.window)


def _eager_branch(case: Case, t: Tensor, norm: Norm) -> Tensor:
    if case.op != "affine_act":
        mean, var = norm.running_mean, norm.running_var
        return F.batch_norm(t, mean, var, norm.weight, norm.bias, norm.training, norm.momentum, norm.eps)
    scale, bias, mean = (None if p is None else p.view(1, -1, 1, 1) for p in _affine(norm))
    z = t if mean is None else t - mean
    z = z if scale is None else z * scale
    return (z if bias is None else z + bias).to(t.dtype)


def _affine(norm: Norm) -> Affine:
    return Affine(norm.weight, norm.bias, norm.running_mean)


_torchvision_schemas = torch.library.Library("torchvision", "FRAGMENT")


def import_torchvision() -> ModuleType:
    """torchvision, also where its compiled part is a CUDA build beside a CPU torch and does not load.

    Two operator schemas are all that its import then misses.
    """
    if "torchvision" not in sys.modules and not _loads_compiled_torchvision():
        for name in ("nms", "qnms"):
            _torchvision_schemas.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module("torchvision")


def _loads_compiled_torchvision() -> bool:
    found = importlib.util.find_spec("torchvision")
    folders = () if found is None else found.submodule_search_locations or ()
    for library in [path for folder in folders for path in Path(folder).glob("_C*.so")]:
        try:
            torch.ops.load_library(library)
        except OSError:
            return False
    return True

"""The compiled kernels against the same formulas in fp64, on every instruction set that this machine has."""

from __future__ import annotations

import itertools
import random

import pytest
import python_backend as python
import torch
from torch import Tensor

from fusedres import build
from fusedres.epilogue import CATALOGUE
from fusedres.native_sources import NATIVE
from fusedres.ops import kernels

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = (
    (2, 1, 5, 5),
    (3, 3, 7, 7),
    (2, 8, 6, 5),
    (3, 35, 9, 9),
    (2, 64, 13, 5),
    (4, 600, 3, 3),
    (70, 24),
    (5, 6, 17),
    (16, 5, 1, 1),
)
EPS = 1e-5


@pytest.fixture(autouse=True)
def loaded():
    found = build.library(NATIVE)
    if isinstance(found, build.Unavailable):
        pytest.skip(found.reason)


def operators():
    return torch.ops.fusedres_native


def wide(t):
    return t.double() if isinstance(t, Tensor) and t.is_floating_point() else t


def assert_close(found: Tensor, expected: Tensor, what: str, slack: float = 1.0) -> None:
    """Equal but for one rounding to `found`'s dtype and the error of arithmetic in the accumulation dtype."""
    assert found.shape == expected.shape, what
    if not expected.numel():
        return
    rounding = 0.51 * torch.finfo(found.dtype).eps
    arithmetic = 1e-12 if found.dtype == torch.float64 else 2e-6
    scale = expected.abs()[expected.isfinite()].amax() if expected.isfinite().any() else 1.0
    bound = slack * (rounding * expected.abs() + arithmetic * scale + torch.finfo(found.dtype).smallest_normal)
    wrong = ~((found.double() - expected).abs() <= bound)
    wrong &= ~(found.double() == expected) & ~(found.isnan() & expected.isnan())
    assert not wrong.any(), f"{what}: {found[wrong][:4].tolist()} expected {expected[wrong][:4].tolist()}"


class Case:
    """Random operands of one combination of forms."""

    def __init__(self, seed, shape, dtype, channels_last, act, source=1, source_r=None, gate=None, affine=True):
        g = torch.Generator().manual_seed(seed)
        self.generator, self.shape, self.dtype, self.act = g, shape, dtype, act
        self.channels_last = channels_last and len(shape) == 4
        self.source, self.source_r, self.affine = source, source_r, affine
        self.x = self.tensor()
        self.residual = None if source_r is None else self.tensor()
        self.norm, self.norm_r = self.parameters(source), self.parameters(source_r or 0)
        self.gate = None
        if gate is not None:
            n, c, wide_gate = gate
            sizes = (shape[0] if n else 1, shape[1] if c else 1, *[1] * (len(shape) - 2))
            self.gate = torch.randn(sizes, generator=g).to(
                torch.promote_types(dtype, torch.float32) if wide_gate else dtype
            )
            if wide_gate and dtype == torch.float64:
                self.gate = self.gate.float()

    def __repr__(self):
        gate = None if self.gate is None else (tuple(self.gate.shape), self.gate.dtype)
        act = CATALOGUE[self.act].name
        return f"{self.shape} {self.dtype} cl={self.channels_last} {act} {self.source} {self.source_r} {gate}"

    def tensor(self, scale=1.0):
        t = torch.randn(self.shape, generator=self.generator, dtype=torch.float64) * 1.5 * scale + 0.3
        t = t.to(self.dtype)
        return t.contiguous(memory_format=torch.channels_last) if self.channels_last else t

    def parameters(self, source):
        """weight, bias, mean, var."""
        c, dtype, g = self.shape[1], torch.promote_types(self.dtype, torch.float32), self.generator
        weight, bias, mean = (torch.randn(c, generator=g, dtype=torch.float64).to(dtype) for _ in range(3))
        var = (torch.rand(c, generator=g, dtype=torch.float64) + 0.2).to(dtype)
        if source == 0:
            return [None] * 4
        if not self.affine:
            return [None, None, mean, var]
        return [weight, bias, mean, var]

    def bn_forward(self, run, convert=lambda t: t, keep_mask=False):
        norm, norm_r = ([None if t is None else convert(t.clone()) for t in p] for p in (self.norm, self.norm_r))
        r = None if self.residual is None else convert(self.residual)
        gate = None if self.gate is None else convert(self.gate)
        found = run(
            convert(self.x),
            *norm,
            r,
            *norm_r,
            gate,
            self.source,
            self.source_r or 0,
            0.1,
            0.3,
            EPS,
            2 * EPS,
            self.act,
            keep_mask,
        )
        return (*found, *norm[2:], *norm_r[2:])

    def bn_backward(self, run, dy, y, mask, stats, stats_r, needs, convert=lambda t: t, save=(True, True)):
        def optional(t):
            return None if t is None else convert(t)

        x = convert(self.x) if save[0] else None
        residual = optional(self.residual) if save[1] else None
        weight, bias, weight_r, bias_r = map(optional, (*self.norm[:2], *self.norm_r[:2]))
        branch, shortcut = (x, weight, bias, convert(stats)), (residual, weight_r, bias_r, convert(stats_r))
        sources = self.source, self.source_r or 0
        return run(convert(dy), optional(y), mask, *branch, *shortcut, optional(self.gate), *sources, self.act, needs)


def cases(count):
    """A seeded sample of the whole grid, every value of every axis many times."""
    rng = random.Random(0)
    gates = [None, None, *itertools.product((0, 1), (0, 1), (0, 1))]
    for seed in range(count):
        shape, dtype = rng.choice(SHAPES), DTYPES[seed % 4]
        act = rng.choice([0, 1, 1, 2, 3, 4, 5, 6, 7])
        source = rng.choice([0, 1, 1, 1, 2])
        yield Case(
            seed,
            shape,
            dtype,
            rng.random() < 0.5,
            act,
            source,
            rng.choice([None, 0, 0, 1, 2]),
            rng.choice(gates),
            rng.random() < 0.8,
        )


CASES = 240


@pytest.mark.parametrize("block", range(8))
def test_bn_act_equals_the_formula_in_fp64(block):
    rng = random.Random(block)
    for case in itertools.islice(cases(CASES), block, None, 8):
        act = CATALOGUE[case.act]
        keep = kernels.keeps_mask(act, case.residual)
        found = case.bn_forward(operators().bn_act_forward, keep_mask=keep)
        expected = case.bn_forward(python.bn_act_forward, wide, keep_mask=keep)
        y, stats, stats_r, mask = found[:4]
        names = ("y", "stats", "stats_r", "mask", "running_mean", "running_var", "running_mean_r", "running_var_r")
        for name, f, e in zip(names, found, expected, strict=True):
            if name.startswith("stats") and f.numel():
                f = torch.stack([f[0].double() + f[1].double(), f[2].double()]).to(f.dtype)
                e = torch.stack([e[0], e[2]])
            if name != "mask" and f is not None:
                assert_close(f, e, f"{case} {name}", slack=4 if name == "y" else 2)
        if keep:
            assert mask.shape == kernels.empty_mask(y, True).shape
            rows = python.unpack(mask, y)
            assert torch.equal(rows, ~(y <= 0)), f"{case} mask"
        assert y.stride() == kernels.empty_output(case.x).stride()

        # The backward of the very same forward: its own mask, y and statistics.
        dy = case.tensor()
        needs = [rng.random() < 0.7 for _ in range(7)]
        needs[3] = needs[3] and case.residual is not None
        needs[4] = needs[4] and case.source_r not in (None, 0)
        needs[1] = needs[1] and case.source != 0
        needs[6] = needs[6] and case.gate is not None
        needs_y = act.from_output and case.act and not keep
        saved = (y if needs_y else None, mask if keep else None, stats, stats_r)
        smooth = not act.from_output
        save_x = smooth or case.source == 1 or needs[1] or needs[6]
        save_r = smooth or case.source_r == 1 or needs[4]
        found = case.bn_backward(operators().bn_act_backward, dy, *saved, needs, save=(save_x, save_r))
        expected = case.bn_backward(
            python.bn_act_backward, dy, wide(saved[0]), saved[1], wide(stats), wide(stats_r), needs, wide
        )
        names = ("dx", "dweight", "dbias", "dr", "dweight_r", "dbias_r", "dgate")
        for name, f, e in zip(names, found, expected, strict=True):
            if name.startswith("d") and f.numel():
                if e.numel() == case.shape[1]:
                    e = e.reshape(f.shape)
                assert_close(f, e, f"{case} {name} {needs}", slack=4)
            assert bool(f.numel()) == bool(e.numel()), name

"""The compiled kernels against the same formulas in fp64, on every instruction set that this machine has."""

from __future__ import annotations

import itertools
import random

import pytest
import python_backend as python
import torch
from torch import Tensor

from fusedres import ops
from fusedres.epilogue import CATALOGUE
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


pytestmark = pytest.mark.usefixtures("native")


def operators():
    return torch.ops.fusedres_native


def wide(t):
    return t.double() if isinstance(t, Tensor) and t.is_floating_point() else t


def assert_close(found: Tensor, expected: Tensor, what: str, slack: float = 1.0, floor: float = 0.0) -> None:
    """Equal but for one rounding to `found`'s dtype and the error of arithmetic in the accumulation dtype."""
    assert found.shape == expected.shape, what
    if not expected.numel():
        return
    rounding = 0.51 * torch.finfo(found.dtype).eps
    arithmetic = 1e-12 if found.dtype == torch.float64 else 2e-6
    scale = max(expected.abs()[expected.isfinite()].amax().item(), floor) if expected.isfinite().any() else 1.0
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
                # A sum may cancel: its error is to be seen beside its terms.
                assert_close(f, e, f"{case} {name} {needs}", slack=4, floor=0.0 if name in ("dx", "dr") else 1.0)
            assert bool(f.numel()) == bool(e.numel()), name
        overwritten(case, dy, saved, needs, (save_x, save_r), found)


def overwritten(case, dy, saved, needs, save, expected):
    """In place dx and dr are the same bits, over x and the residual, which are touched for nothing else."""
    x, residual = case.x, case.residual
    operands = [t if t is None else t.clone() for t in (x, residual)]
    case.x, case.residual = operands
    try:
        found = list(case.bn_backward(operators().bn_act_backward_, dy, *saved, needs, save=save))
    finally:
        case.x, case.residual = x, residual
    for index, given, operand, kept in zip((0, 3), (x, residual), operands, save, strict=True):
        if needs[index] and kept and operand is not None:
            assert found[index].numel() == 0
            found[index] = operand
        elif operand is not None:
            assert same(operand, given)
    assert all(same(f, e) for f, e in zip(found, expected, strict=True)), f"{case} {needs}"


def same(t, other):
    return torch.equal(t.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def affine_operands(case):
    (scale, bias, mean, _), (scale_r, bias_r, mean_r, _) = case.norm, case.norm_r
    return (scale, bias, mean), (scale_r, bias_r, mean_r)


@pytest.mark.parametrize("block", range(4))
def test_affine_act_equals_the_formula_in_fp64(block):
    rng = random.Random(block)
    for case in itertools.islice(cases(CASES // 2), block, None, 4):
        act = CATALOGUE[case.act]
        keep = kernels.keeps_mask(act, case.residual)
        branch, branch_r = affine_operands(case)
        operands = (case.x, *branch, case.residual, *branch_r, case.gate)
        y, mask = operators().affine_act_forward(*operands, case.act, keep)
        expected, _ = python.affine_act_forward(*map(wide, operands), case.act, keep)
        assert_close(y, expected, f"{case} y", slack=4)

        dy = case.tensor()
        needs = [True, branch[0] is not None, branch[1] is not None, case.residual is not None]
        needs += [branch_r[0] is not None and case.residual is not None] * 2 + [case.gate is not None]
        needs = [needed and rng.random() < 0.8 for needed in needs]
        saved_y = y if act.from_output and case.act and not keep else None
        saved_mask = mask if keep else None
        arguments = (dy, saved_y, saved_mask, *operands)
        found = operators().affine_act_backward(*arguments, case.act, needs)
        expected = python.affine_act_backward(*map(wide, arguments), case.act, needs)
        for name, f, e in zip(
            ("dx", "dscale", "dbias", "dr", "dscale_r", "dbias_r", "dgate"), found, expected, strict=True
        ):
            if f.numel():
                assert_close(
                    f, e.reshape(f.shape), f"{case} {name}", slack=4, floor=0.0 if name in ("dx", "dr") else 1.0
                )


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values_pass_as_in_eager(dtype, channels_last):
    x = torch.tensor(
        [float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1e-40, 3e-8, -1.5, 2.5, 6.5] * 5, dtype=torch.float64
    )
    x = x.reshape(1, 2, 5, 5).to(dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    for act in CATALOGUE:
        y, _ = operators().affine_act_forward(x, *[None] * 8, act.code, False)
        expected = act.formula(x)
        if act.name == "gelu":  # eager's vectorised erf makes NaN of infinity, its scalar one does not
            y, expected = y[~x.isinf()], expected[~x.isinf()]
        torch.testing.assert_close(y, expected, rtol=max(1e-6, torch.finfo(dtype).eps), atol=1e-7, equal_nan=True)
        if act.name == "identity":
            assert torch.equal(y.contiguous().view(torch.uint8), x.contiguous().view(torch.uint8))
    zero = torch.zeros_like(x)
    y, mask = operators().affine_act_forward(x, *[None] * 3, zero, *[None] * 4, 1, True)
    dy = torch.full_like(x, float("nan"))
    dr = operators().affine_act_backward(
        dy, None, mask, *[None] * 9, 1, [False, False, False, True, False, False, False]
    )[3]
    assert torch.equal(dr.isnan(), ~(y <= 0)) and (dr[y <= 0] == 0).all()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ratio", [0.0, 1e4, 1e6])
def test_a_mean_much_larger_than_the_deviation_costs_no_accuracy(ratio, dtype, channels_last):
    case = Case(1, (8, 24, 14, 14), dtype, channels_last, 0)
    case.x = case.x + ratio
    y, _stats, *_ = case.bn_forward(operators().bn_act_forward)
    expected = case.bn_forward(python.bn_act_forward, wide)[0]
    error = (y.double() - expected).norm() / expected.norm()
    assert error < (1e-12 * max(ratio, 1) if dtype == torch.float64 else 3e-7)


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_low_part_of_a_large_mean_counts_in_the_backward(channels_last):
    case = Case(1, (8, 24, 14, 14), torch.float32, channels_last, 0)
    case.x = case.x + 1e4
    saved = (None, None, *case.bn_forward(operators().bn_act_forward)[1:3])
    dy = (case.x - 1e4) ** 2  # what remains of it beside the statistics' gradients is small
    needs = [True] + [False] * 6
    dx = case.bn_backward(operators().bn_act_backward, dy, *saved, needs)[0]
    exact = case.bn_backward(python.bn_act_backward, wide(dy), None, None, *map(wide, saved[2:]), needs, wide)[0]
    assert (dx.double() - exact).norm() / exact.norm() < 1e-6


@pytest.mark.parametrize("channels_last", [False, True])
def test_an_infinite_value_makes_the_mean_infinite_as_in_eager(channels_last):
    case = Case(1, (2, 16, 5, 5), torch.float32, channels_last, 0)
    case.x[0, 3, 0, 0] = float("inf")
    running_mean, running_var = case.bn_forward(operators().bn_act_forward)[4:6]
    assert running_mean[3] == float("inf") and running_var[3].isnan()
    assert running_mean[:3].isfinite().all() and running_mean[4:].isfinite().all()


def test_an_outlier_in_the_first_pixel_costs_no_accuracy():
    for channels_last in (False, True):
        case = Case(1, (4, 16, 14, 14), torch.float32, channels_last, 0)
        case.x[0, :, 0, 0] = 1000
        y = case.bn_forward(operators().bn_act_forward)[0]
        expected = case.bn_forward(python.bn_act_forward, wide)[0]
        assert (y.double() - expected).norm() / expected.norm() < 5e-7


def outcome(case, dy):
    """Everything of one forward and backward, as bytes."""
    found = case.bn_forward(operators().bn_act_forward, keep_mask=True)
    y, stats, stats_r, mask = found[:4]
    gradients = case.bn_backward(
        operators().bn_act_backward, dy, None, mask, stats, stats_r, [True] * 6 + [case.gate is not None]
    )
    return [
        t.contiguous().view(torch.uint8) for t in (y, stats, stats_r, mask, *gradients) if t is not None and t.numel()
    ]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("gate", [None, (1, 1, 0)])
def test_results_are_the_same_bits_whatever_the_threads(channels_last, gate):
    threads = torch.get_num_threads()
    for dtype in (torch.float32, torch.bfloat16):
        case = Case(5, (6, 48, 40, 40), dtype, channels_last, 1, source_r=1, gate=gate)
        dy = case.tensor()
        first = outcome(case, dy)
        try:
            for count in (1, 2, 3) * 34:
                torch.set_num_threads(count)
                again = outcome(case, dy)
                assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), count
        finally:
            torch.set_num_threads(threads)


# Rows of whole cache lines, of lines and a half, and of no whole vectors.
LARGE = (((8, 64, 96, 96), True), ((6, 48, 130, 130), True), ((6, 1024, 28, 28), False), ((8, 2816, 14, 14), False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape, channels_last", LARGE)
def test_what_bypasses_the_caches_is_what_smaller_tensors_are(shape, channels_last, dtype):
    """Beyond 8 MiB; the same values image by image are below."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    generator = torch.Generator().manual_seed(0)
    x, r, dy = (torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=layout) for _ in range(3))
    affine = ops.Affine(torch.rand(shape[1], generator=generator), torch.randn(shape[1], generator=generator))
    assert x.nbytes > 8 << 20 > x[:1].nbytes

    def results(x, r, dy):
        x, r = x.detach().requires_grad_(), r.detach().requires_grad_()
        y = ops.affine_act(x, affine, residual=r, act="relu")
        return y.detach(), *torch.autograd.grad(y, (x, r), dy)

    images = [results(*(t[i : i + 1] for t in (x, r, dy))) for i in range(shape[0])]
    for found, expected in zip(results(x, r, dy), zip(*images, strict=True), strict=True):
        assert torch.equal(found, torch.cat(expected))


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_relus_slope_found_again_from_a_large_input_is_that_of_the_output(dtype, channels_last):
    """Beyond 4 MiB the kernels read x and not y; with a mask they never do."""
    case = Case(0, (3, 33, 150, 150) if dtype.itemsize < 4 else (2, 33, 130, 130), dtype, channels_last, act=1)
    assert case.x.nbytes > 4 << 20
    y, stats, stats_r, mask, *_ = case.bn_forward(operators().bn_act_forward, keep_mask=True)
    dy, needs = case.tensor(), [True, True, True, False, False, False, False]
    from_mask = case.bn_backward(operators().bn_act_backward, dy, None, mask, stats, stats_r, needs)
    found = case.bn_backward(operators().bn_act_backward, dy, y, None, stats, stats_r, needs)
    for ours, expected in zip(found, from_mask, strict=True):  # but for the order in which sums are added up
        if ours.numel():
            torch.testing.assert_close(
                ours, expected, rtol=max(1e-5, torch.finfo(ours.dtype).eps), atol=1e-5 * expected.abs().max()
            )

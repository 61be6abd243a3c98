"""The native backend as users meet it: what it objects to, what autograd sees of it, and its instruction sets."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from training_steps import relative_error

import fusedres
from fusedres import ops

pytestmark = pytest.mark.usefixtures("native")


@pytest.mark.parametrize("expanded", [False, True])
def test_a_gradient_of_any_strides_is_taken(expanded):
    x, r = (torch.randn(2, 4, 2, 2).contiguous(memory_format=torch.channels_last) for _ in range(2))
    running = torch.zeros(4), torch.ones(4)
    results = []
    for backend in ("native", "reference"):
        a, b = x.clone().requires_grad_(), r.clone().requires_grad_()
        with fusedres.use_backend(backend):
            y = ops.bn_act(a, ops.Norm(None, None, *running), residual=b)
            dy = torch.ones(()).expand(y.shape) if expanded else torch.arange(32.0).reshape(2, 4, 2, 2)
            y.backward(dy)
        results.append((a.grad, b.grad))
    for native_gradient, reference_gradient in zip(*results, strict=True):
        torch.testing.assert_close(native_gradient, reference_gradient)


def test_running_statistics_move_where_autograd_can_see_it():
    mean, var, x = torch.zeros(4), torch.ones(4), torch.randn(2, 4, 3, 3)
    with fusedres.use_backend("native"):
        for grad in (True, False):
            before = mean._version, var._version
            with torch.set_grad_enabled(grad):
                ops.bn_act(x.clone().requires_grad_(grad), ops.Norm(None, None, mean, var, training=True))
            assert mean._version > before[0] and var._version > before[1]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_statistics_of_values_whose_squares_overflow_are_those_of_the_formula(layout):
    x = (4e19 * (1 + torch.arange(720) % 5 / 128)).reshape(2, 40, 3, 3).bfloat16().contiguous(memory_format=layout)
    with fusedres.use_backend("native"):
        y = ops.bn_act(x, ops.Norm(None, None, torch.zeros(40), torch.ones(40), training=True))
    exact = torch.nn.functional.batch_norm(x.double(), None, None, training=True).relu()
    rounded = exact.bfloat16()
    assert relative_error(y, exact) <= 1.1 * relative_error(rounded, exact)
    assert (y - exact).abs().amax() <= 1.1 * (rounded - exact).abs().amax()


def test_nothing_is_left_to_be_refused_silently():
    x = torch.randn(2, 4, 3, 3)
    with fusedres.use_backend("native"):
        with pytest.raises(RuntimeError, match="neither contiguous nor channels_last"):
            ops.affine_act(x[:, ::2])
        with pytest.raises(RuntimeError, match=r"residual is torch.float64"):
            ops.affine_act(x, residual=x.double())
        with pytest.raises(RuntimeError, match="bring both into one layout"):
            ops.affine_act(x, residual=x.contiguous(memory_format=torch.channels_last))
        with pytest.raises(RuntimeError, match=r"torch.float32 parameters"):
            ops.affine_act(x, ops.Affine(torch.ones(4).double()))


def results(backend: str, f: Callable[..., torch.Tensor], x: torch.Tensor, *tensors: torch.Tensor):
    """y, the gradients of x and of the first two tensors, and how the others moved."""
    with fusedres.use_backend(backend):
        leaves = [t.detach().clone().requires_grad_() for t in (x, *tensors[:2])]
        moving = [t.clone() for t in tensors[2:]]
        y = f(*leaves, *moving)
        return [y.detach(), *torch.autograd.grad(y.sum(), leaves), *moving]


OPS = {
    "bn_act": lambda x, weight, bias, mean, var: ops.bn_act(x, ops.Norm(weight, bias, mean, var, True), residual=x),
    "frozen bn_act": lambda x, weight, bias, mean, var: ops.bn_act(x, ops.Norm(weight, bias, mean, var), residual=x),
    "bn_act_pool": lambda x, weight, bias, mean, var: ops.bn_act_pool(
        x, ops.Norm(weight, bias, mean, var, True), kernel_size=2
    ),
    "affine_act": lambda x, weight, bias, mean, var: ops.affine_act(x, ops.Affine(weight, bias, mean)),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_parameters_and_statistics_may_be_in_half_precision_as_after_model_half(dtype, op):
    x, parameters = torch.randn(4, 6, 8, 8), (torch.rand(6), torch.rand(6), torch.zeros(6), torch.ones(6))
    given = [t.to(dtype) for t in (x, *parameters)]
    for ours, eager in zip(*(results(b, OPS[op], *given) for b in ("native", "reference")), strict=True):
        assert ours.dtype == dtype
        ulps = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(ours, eager, rtol=ulps, atol=ulps * eager.abs().max().item())


@pytest.mark.parametrize("op", OPS)
def test_parameters_and_statistics_may_be_strided(op):
    x, table = torch.randn(4, 6, 8, 8), torch.rand(6, 4).add(0.5)
    dense = [t.contiguous() for t in table.unbind(1)]
    with fusedres.use_backend("native"):
        assert torch.equal(OPS[op](x, *table.unbind(1)), OPS[op](x, *dense))
    assert torch.equal(table, torch.stack(dense, 1))


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last_3d])
def test_volumes_are_served_in_both_memory_orders(order):
    x = torch.randn(2, 6, 3, 4, 5).contiguous(memory_format=order)
    given = (x, torch.rand(6), torch.rand(6), torch.zeros(6), torch.ones(6))
    for ours, eager in zip(*(results(b, OPS["bn_act"], *given) for b in ("native", "reference")), strict=True):
        assert ours.stride() == eager.stride()
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("shape", [(6, 35), (6, 35, 1, 1), (6, 40)], ids=str)
def test_the_mask_of_one_pixel_planes_has_rows_of_channels(shape):
    x, r = (torch.randn(shape).requires_grad_() for _ in range(2))
    with fusedres.use_backend("native"):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            y = ops.bn_act(x, ops.Norm(training=True), residual=r)
    (mask,) = (t for t in kept if t.dtype == torch.uint8)
    assert mask.shape == (6, 5)
    dx, dr = torch.autograd.grad(y.sum(), [x, r])
    assert dx.stride() == x.stride() and dr.stride() == r.stride()
    assert torch.equal(dr, (y > 0).float())


@pytest.mark.parametrize("training", [True, False])
def test_fewer_planes_than_threads_are_shared_out(training):
    """Two planes of several pieces each, the last of them odd: the same bits, whatever the threads."""
    x, r = (torch.randn(1, 2, 301, 333).requires_grad_() for _ in range(2))
    outcomes = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            with fusedres.use_backend("native"):
                y = ops.bn_act(x, ops.Norm(None, None, torch.zeros(2), torch.ones(2), training), residual=r)
                outcomes.append([y, *torch.autograd.grad(y, [x, r], torch.ones(()).expand(y.shape))])
        finally:
            torch.set_num_threads(1)
    with fusedres.use_backend("reference"):
        y = ops.bn_act(x, ops.Norm(None, None, torch.zeros(2), torch.ones(2), training), residual=r)
        expected = [y, *torch.autograd.grad(y, [x, r], torch.ones(()).expand(y.shape))]
    for one, three, eager in zip(*outcomes, expected, strict=True):
        assert torch.equal(one, three)
        torch.testing.assert_close(one, eager, atol=1e-5, rtol=1e-5)


def in_process(isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    package = str(Path(fusedres.__file__).parents[1])  # a checkout need not be installed
    environment = {**os.environ, "FUSEDRES_CPU_ISA": isa, "PYTHONPATH": package}
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )


FORMULA_TESTS = (
    "test_native.py",
    "test_native_convolution.py",
    "test_native_windows.py",
    "test_native_training.py",
    "test_native_training_bf16.py",
    "test_native_dweight.py",
    "test_max_pool.py",
    "test_head.py",
)
POOL_TESTS = (
    "test_the_result_is_that_of_pooling_the_activation",
    "test_results_are_the_same_bits_whatever_the_threads",
)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set_equals_the_formula(isa):
    pool = [f"test_bn_act_pool.py::{name}" for name in POOL_TESTS]
    run = in_process(isa, "-m", "pytest", "-q", "-p", "no:cacheprovider", *FORMULA_TESTS, *pool)
    assert run.returncode == 0, run.stdout


@pytest.mark.parametrize("isa", ["avx512_widened", "avx512_bf16"])
def test_both_ways_to_multiply_bfloat16_equal_the_formula(isa):
    """One of them is what this processor is faster with, the other what FUSEDRES_CPU_ISA asks for."""
    imports = "import torch; from fusedres.backends import native_convolution as native"
    if in_process(isa, "-c", f"{imports}; print(native.instruction_set(torch.bfloat16))").stdout.strip() != isa:
        pytest.skip("this processor has no bfloat16 in AVX-512")
    tests = [name for name in FORMULA_TESTS if name.startswith("test_native_")]
    run = in_process(isa, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, "-k", "bfloat16 or bf16")
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set_keeps_the_shared_cases_within_the_bar(isa):
    run = in_process(isa, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_numerics.py", "-k", "native and errors")
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout


def test_an_unknown_instruction_set_is_an_error_with_the_choices():
    run = in_process("sse9", "-c", "import torch, fusedres; fusedres.ops.affine_act(torch.ones(2, 1, 2, 2))")
    choices = "portable, avx2, avx512, avx512_widened, avx512_bf16, amx"
    assert f"FUSEDRES_CPU_ISA must be one of {choices}; got 'sse9'" in run.stderr


class Mallinfo(ctypes.Structure):
    """glibc's `struct mallinfo2`: arenas, then what is in use of mappings and of arenas."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in ("a", "b", "c", "d", "mapped", "f", "g", "used", "i", "j"))


def allocated_bytes() -> int:
    """All that malloc has given out, by whatever library."""
    gc.collect()
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Mallinfo
    found = mallinfo()
    return found.mapped + found.used


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="counts by glibc's mallinfo2")
@pytest.mark.parametrize(
    "layout, dtype", [(torch.contiguous_format, torch.float32), (torch.channels_last, torch.bfloat16)], ids=str
)
def test_a_thousand_steps_leak_nothing(layout, dtype):
    """Not 32 bytes a step."""
    block = fusedres.Bottleneck(16, 8, stride=2)
    x = torch.randn(4, 16, 16, 16).contiguous(memory_format=layout).requires_grad_()

    def steps(count: int) -> int:
        for _ in range(count):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
                y = block(x)
            y.float().sum().backward()
        return allocated_bytes()

    before = steps(300)
    assert steps(1000) - before < 32_000


def step(seed: int) -> list[torch.Tensor]:
    """Everything of one training step on inputs of that seed."""
    generator = torch.Generator().manual_seed(seed)
    x, r = (torch.randn(3, 16 + seed, 12, 12, generator=generator).requires_grad_() for _ in range(2))
    weight = torch.rand(16 + seed, generator=generator).requires_grad_()
    y = ops.bn_act(x, ops.Norm(weight, training=True), residual=r)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, r, weight])]


def test_eight_threads_at_once_do_not_disturb_each_other():
    alone = [step(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            for expected, found in zip(alone, pool.map(step, range(8)), strict=True):
                assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


FORK = """
import os, torch, test_native_backend
torch.set_num_threads(1)
if {before}:
    expected = test_native_backend.step(3)
child = os.fork()
found = test_native_backend.step(3)
if child == 0:
    os._exit(0 if not {before} or all(torch.equal(a, b) for a, b in zip(expected, found)) else 1)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.parametrize("used_before", [False, True])
def test_a_forked_child_computes_what_its_parent_does(run_python, used_before):
    run_python(FORK.format(before=used_before), FUSEDRES_BACKEND="native")

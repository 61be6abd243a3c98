"""bn_act_pool: eager's choice of every window, gradients of every subset, schemas, compilation, and bad input."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fusedres
from fusedres import dispatch
from fusedres.backends import Statistics, Window
from fusedres.ops import Norm, bn_act, bn_act_pool

WINDOWS = (
    Window((3, 3), (2, 2), (1, 1)),
    Window((2, 2), (2, 2), (0, 0)),
    Window((5, 3), (1, 4), (2, 1)),
    Window((1, 6), (3, 1), (0, 3)),
)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ORDERS = (torch.contiguous_format, torch.channels_last)


def pooling(name: str) -> str:
    if not dispatch.backend(name).computes("bn_act_pool"):
        pytest.skip(f"the {name} backend has no bn_act_pool")
    return name


@pytest.fixture
def fused_backend(fused_backend: str) -> str:
    return pooling(fused_backend)


@pytest.fixture
def kernel_backend(kernel_backend: str) -> str:
    return pooling(kernel_backend)


def unfused(x: Tensor, norm: Norm, window: Window, act: str = "relu") -> Tensor:
    return F.max_pool2d(bn_act(x, norm, act=act), *window)


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def pooled(window: Window, training: bool, act: str = "relu") -> Callable[..., Tensor]:
    def f(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        running = torch.full((3,), 0.1, dtype=torch.float64), torch.full((3,), 1.3, dtype=torch.float64)
        norm = Norm(weight, bias, *(running if not training else (None, None)), training)
        return bn_act_pool(x, norm, **window._asdict(), act=act)

    return f


SHAPES = ((2, 3, 7, 6), (1, 35, 5, 19), (1, 2, 4, 1300), (1, 600, 4, 4))


@pytest.mark.parametrize("act", ["relu", "identity"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_result_is_that_of_pooling_the_activation(
    fused_backend: str, dtype: torch.dtype, order: torch.memory_format, act: str
) -> None:
    for shape, window in itertools.product(SHAPES, WINDOWS):
        require_the_same_as_pooling_the_activation(shape, window, dtype, order, act)


def require_the_same_as_pooling_the_activation(
    shape: tuple[int, ...], window: Window, dtype: torch.dtype, order: torch.memory_format, act: str
) -> None:
    """Bit for bit; few distinct values make ties, and the special ones must win, lose and spread as in eager."""
    wide = torch.promote_types(dtype, torch.float32)
    x = torch.randn(shape, dtype=torch.float64).mul(3).round().div(2)
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, -0.0, 1e-45], dtype=torch.float64)
    x.view(-1)[torch.randperm(x.numel())[: 6 * shape[0]]] = special.repeat(shape[0])
    x[0, 0] = -torch.inf  # nothing is larger than the padding, which must not be chosen
    x = x.to(dtype).contiguous(memory_format=order)
    c = shape[1]
    weight, bias, mean = (torch.randn(c, dtype=wide) for _ in range(3))
    weight[0] = 1.0
    norm = Norm(weight, bias, mean, torch.rand(c, dtype=wide) + 0.1)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = bn_act_pool(ours, norm, **window._asdict(), act=act), unfused(theirs, norm, window, act)
    assert y.dtype == dtype and y.stride() == expected.stride()
    assert torch.equal(y.nan_to_num(7.0), expected.nan_to_num(7.0)), (shape, window)
    dy = torch.randint(1, 9, y.shape).to(dtype)  # its sums are exact
    (dx,), (expected_dx,) = torch.autograd.grad(y, ours, dy), torch.autograd.grad(expected, theirs, dy)
    assert dx.stride() == expected_dx.stride()
    torch.testing.assert_close(dx, expected_dx, rtol=2 * torch.finfo(dtype).eps, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("subset", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_every_subset(fused_backend: str, training: bool, subset: tuple[bool, ...]) -> None:
    window, shapes = WINDOWS[sum(subset)], ((2, 3, 5, 6), (3,), (3,))
    operands = [leaf(*shape).detach().requires_grad_(need) for shape, need in zip(shapes, subset, strict=True)]
    if any(subset):
        assert torch.autograd.gradcheck(pooled(window, training), operands)
    else:
        assert not pooled(window, training)(*operands).requires_grad


@pytest.mark.parametrize("act", ["relu", "identity", "silu"])
@pytest.mark.parametrize("training", [True, False])
def test_second_order_gradients(fused_backend: str, training: bool, act: str) -> None:
    operands = leaf(2, 3, 5, 4), leaf(3), leaf(3)
    for order in ORDERS:
        x = operands[0].detach().contiguous(memory_format=order).requires_grad_()
        f = pooled(WINDOWS[0], training, act)
        assert torch.autograd.gradgradcheck(f, (x, *operands[1:]), fast_mode=True)


@pytest.mark.parametrize("order", ORDERS)
def test_opcheck_without_exemptions(kernel_backend: str, order: torch.memory_format) -> None:
    operators = getattr(torch.ops, f"fusedres_{kernel_backend}")
    opcheck = torch.library.opcheck
    x = torch.randn(2, 3, 6, 5).contiguous(memory_format=order)
    weight, bias, mean, var = torch.rand(3), torch.rand(3), torch.zeros(3), torch.ones(3)
    for source, window in ((Statistics.BATCH, WINDOWS[0]), (Statistics.RUNNING, WINDOWS[2])):
        rest = (weight, bias, mean, var, source.value, 0.1, 1e-5, *window, 1)
        opcheck(operators.bn_act_pool.default, (x.clone().requires_grad_(), *rest))
        opcheck(operators.bn_act_pool.default, (x, *rest))
        for keep_choice in (False, True):
            opcheck(operators.bn_act_pool_forward.default, (x, *rest, keep_choice))
        y, stats, choice = operators.bn_act_pool_forward(x, *rest, True)
        assert choice.dtype == torch.uint8 and choice.shape == y.shape
        for needs in ([True] * 3, [False] * 3, [True, False, True]):
            saved = (torch.randn_like(y), choice, x, weight, stats, source.value, *window, needs)
            opcheck(operators.bn_act_pool_backward.default, saved)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("order", ORDERS)
def test_results_are_the_same_bits_whatever_the_threads(order: torch.memory_format) -> None:
    x = torch.randn(6, 24, 60, 60).contiguous(memory_format=order).requires_grad_()
    weight, bias = torch.rand(24, requires_grad=True), torch.rand(24, requires_grad=True)
    dy = torch.randn(6, 24, 30, 30)

    def outcome() -> list[Tensor]:
        y = bn_act_pool(x, Norm(weight, bias, training=True), kernel_size=3, stride=2, padding=1)
        return [y, *torch.autograd.grad(y, (x, weight, bias), dy)]

    threads, first = torch.get_num_threads(), outcome()
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(first, outcome(), strict=True)), count
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dynamo_backend", ["aot_eager", "inductor"])
def test_fullgraph_compilation_moves_the_statistics_once(
    fused_backend: str, dynamo_backend: str, order: torch.memory_format
) -> None:
    torch._dynamo.reset()
    x = torch.randn(2, 5, 8, 8).contiguous(memory_format=order).requires_grad_()
    weight, bias = torch.rand(5, requires_grad=True), torch.rand(5, requires_grad=True)

    def f(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return bn_act_pool(x, Norm(weight, bias, mean, var, training=True), kernel_size=3, stride=2, padding=1)

    found = []
    for run in (f, torch.compile(f, fullgraph=True, backend=dynamo_backend)):
        mean, var = torch.zeros(5), torch.ones(5)
        y = run(x, mean, var)
        found.append([y, mean, var, *torch.autograd.grad(y.square().sum(), [x, weight, bias])])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager)
        assert compiled.stride() == eager.stride()


def test_running_statistics_move_where_autograd_can_see_it(kernel_backend: str) -> None:
    mean, var = torch.zeros(3), torch.ones(3)
    versions = mean._version, var._version
    bn_act_pool(torch.randn(2, 3, 4, 4), Norm(None, None, mean, var, training=True), kernel_size=2)
    assert mean._version > versions[0] and var._version > versions[1] and not var.eq(1).any()


def test_a_byte_a_window_is_kept_and_no_activation(kernel_backend: str) -> None:
    x = torch.randn(2, 8, 16, 16, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = bn_act_pool(x, Norm(training=True), kernel_size=3, stride=2, padding=1)
    assert sum(t.nbytes for t in kept if t is not x) == y.numel() + 3 * 8 * 4


def test_a_gradient_of_any_strides_is_taken(kernel_backend: str) -> None:
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    y = bn_act_pool(x, Norm(training=True), kernel_size=2)
    for dy in (torch.ones(()).expand(y.shape), torch.randn(y.shape).contiguous(memory_format=torch.channels_last)):
        (expected,) = torch.autograd.grad(y, x, dy.contiguous(), retain_graph=True)
        assert torch.equal(torch.autograd.grad(y, x, dy, retain_graph=True)[0], expected)


def test_an_empty_batch_is_eagers(fused_backend: str) -> None:
    x = torch.randn(0, 3, 4, 4, requires_grad=True)
    y = bn_act_pool(x, Norm(training=True), kernel_size=2)
    assert y.shape == (0, 3, 2, 2) and torch.autograd.grad(y.sum(), x)[0].shape == x.shape


def test_kernels_object_to_what_a_byte_can_not_say(kernel_backend: str) -> None:
    x, norm = torch.randn(2, 3, 20, 20), Norm(None, None, torch.zeros(3), torch.ones(3))
    with fusedres.use_backend(kernel_backend):
        assert bn_act_pool(x, norm, kernel_size=(15, 17), stride=1).shape == (2, 3, 6, 4)
        with pytest.raises(RuntimeError, match="windows of at most 255 values, not 256"):
            bn_act_pool(x, norm, kernel_size=16)
        with pytest.raises(RuntimeError, match="pool after relu or identity, not after silu"):
            bn_act_pool(x, norm, kernel_size=2, act="silu")
    assert bn_act_pool(x, norm, kernel_size=16, act="silu").shape == (2, 3, 1, 1)


X, NORM = torch.randn(2, 3, 4, 4), Norm(None, None, torch.zeros(3), torch.ones(3))
BAD_INPUT = {
    r"x must be .N, C, H, W., got .2, 3, 16.; reshape": lambda: bn_act_pool(X.flatten(2), NORM, kernel_size=2),
    r"kernel_size and stride must be at least 1, got .0, 2. and .0, 2.": lambda: bn_act_pool(
        X, NORM, kernel_size=(0, 2)
    ),
    r"padding must be at most half of kernel_size, got .2, 1. for .3, 3.": lambda: bn_act_pool(
        X, NORM, kernel_size=3, padding=(2, 1)
    ),
    r"x must hold at least one window of .5, 5. .* got .2, 3, 4, 4.; pass a": lambda: bn_act_pool(
        X, NORM, kernel_size=5
    ),
    "norm must have running_mean and running_var": lambda: bn_act_pool(X, Norm(), kernel_size=2),
}


@pytest.mark.parametrize("message", BAD_INPUT)
def test_bad_input_gets_the_rule_what_came_and_the_remedy(fused_backend: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BAD_INPUT[message]()


@pytest.mark.usefixtures("native")
def test_sums_of_more_channels_than_are_added_up_together():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1100, 6, 5, generator=generator).contiguous(memory_format=torch.channels_last)
    found = []
    for backend, dtype in (("native", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        leaf, weight, bias = (t.to(dtype, copy=True).requires_grad_() for t in (x, torch.ones(1100), torch.zeros(1100)))
        with fusedres.use_backend(backend):
            y = bn_act_pool(leaf, Norm(weight, bias, training=True), kernel_size=3, stride=2, padding=1)
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y))
        found.append((leaf.grad, weight.grad, bias.grad))
    for ours, eager, exact in zip(*found, strict=True):
        assert (ours - exact).norm() <= 1.1 * (eager - exact).norm()

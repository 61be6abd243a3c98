"""affine_act and bn_act as operators: gradients of every subset, schemas, strides, compilation, and bad input."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fusedres import numerics, testing
from fusedres.backends import Statistics
from fusedres.epilogue import CATALOGUE
from fusedres.ops import Affine, Norm, affine_act, bn_act, kernels

SMOOTH = [row.name for row in CATALOGUE if not row.from_output]


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def both_norms(training: bool, training_r: bool, act: str) -> Callable[..., Tensor]:
    def f(x, weight, bias, residual, weight_r, bias_r, gate):
        running = torch.full((3,), 0.1, dtype=torch.float64), torch.full((3,), 1.3, dtype=torch.float64)
        norm = Norm(weight, bias, *(running if not training else (None, None)), training)
        norm_r = Norm(weight_r, bias_r, *(running if not training_r else (None, None)), training_r)
        return bn_act(x, norm, residual=residual, residual_norm=norm_r, gate=gate, act=act)

    return f


def both_affine(x, scale, bias, mean, residual, scale_r, bias_r, mean_r, gate, act="relu"):
    affine, affine_r = Affine(scale, bias, mean), Affine(scale_r, bias_r, mean_r)
    return affine_act(x, affine, residual=residual, residual_affine=affine_r, gate=gate, act=act)


def bn_operands() -> list[Tensor]:
    return [leaf(2, 3, 2, 3), leaf(3), leaf(3), leaf(2, 3, 2, 3), leaf(3), leaf(3), leaf(2, 1, 1, 1)]


@pytest.mark.parametrize(
    "subset", list(itertools.product([False, True], repeat=7)), ids=lambda s: "".join("01"[b] for b in s)
)
def test_gradients_of_every_subset_of_bn_act(fused_backend: str, subset: tuple[bool, ...]) -> None:
    operands = [t.detach().requires_grad_(needed) for t, needed in zip(bn_operands(), subset, strict=True)]
    f = both_norms(True, False, "relu")
    if any(subset):
        assert torch.autograd.gradcheck(f, operands, fast_mode=True)
    else:
        assert not f(*operands).requires_grad


@pytest.mark.parametrize("chosen", [*itertools.combinations(range(9), 1), *itertools.combinations(range(9), 8)])
def test_gradients_of_one_operand_and_all_but_one_of_affine_act(fused_backend: str, chosen: tuple[int, ...]) -> None:
    shapes = [(2, 3, 2, 3), (3,), (3,), (3,), (2, 3, 2, 3), (3,), (3,), (3,), (1, 3, 1, 1)]
    operands = [leaf(*shape).detach().requires_grad_(index in chosen) for index, shape in enumerate(shapes)]
    assert torch.autograd.gradcheck(both_affine, operands, fast_mode=True)


@pytest.mark.parametrize("act", [row.name for row in CATALOGUE])
@pytest.mark.parametrize("modes", list(itertools.product([True, False], repeat=2)), ids=str)
def test_first_and_second_order_gradients_of_both_norms(fused_backend: str, act: str, modes: tuple[bool, bool]) -> None:
    operands = bn_operands()
    f = both_norms(*modes, act)
    assert torch.autograd.gradcheck(f, operands)
    assert torch.autograd.gradgradcheck(f, operands, fast_mode=act not in SMOOTH)


@pytest.mark.parametrize("act", [row.name for row in CATALOGUE])
def test_second_order_gradients_of_affine_act(fused_backend: str, act: str) -> None:
    shapes = [(2, 3, 2, 3), (3,), (3,), (3,), (2, 3, 2, 3), (3,), (3,), (3,), (2, 3, 1, 1)]
    operands = [leaf(*shape) for shape in shapes]
    assert torch.autograd.gradgradcheck(lambda *t: both_affine(*t, act=act), operands, fast_mode=True)


@pytest.mark.usefixtures("kernels")
def test_third_order_gradients_where_atens_batch_norm_has_none() -> None:
    x, w = leaf(3, 2, 2, 2), leaf(2)

    def second(x: Tensor, w: Tensor) -> Tensor:
        y = bn_act(x, Norm(w, None, training=True), residual=x, act="silu")
        (dx,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
        (ddw,) = torch.autograd.grad((dx**2).sum(), w, create_graph=True)
        return ddw

    assert torch.autograd.gradcheck(second, (x, w))


def test_one_operand_computed_from_another_keeps_the_gradients_apart(fused_backend: str) -> None:
    r, w = leaf(3, 2, 2, 2), leaf(2)

    def f(r: Tensor, w: Tensor) -> Tensor:
        return bn_act(r * r, Norm(w, None, training=True), residual=r)

    assert torch.autograd.gradgradcheck(f, (r, w))


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("keep_mask", [False, True])
def test_opcheck_without_exemptions(kernel_backend: str, keep_mask: bool, order: torch.memory_format) -> None:
    operators = getattr(torch.ops, f"fusedres_{kernel_backend}")
    opcheck = torch.library.opcheck
    x, r = (torch.randn(2, 3, 4, 5).to(memory_format=order) for _ in range(2))
    weight, bias, mean, var = torch.rand(3), torch.rand(3), torch.zeros(3), torch.ones(3)
    gate = torch.rand(2, 1, 1, 1)
    scalars = (Statistics.BATCH.value, Statistics.BATCH.value, 0.1, 0.2, 1e-5, 1e-4, 1)
    bn = (x, weight, bias, mean, var, r, weight, bias, mean.clone(), var.clone(), gate, *scalars)
    affine = (x, weight, bias, mean, r, weight, bias, mean, gate, 1)
    for name, arguments in (("bn_act", bn), ("affine_act", affine)):
        wanting = [t.detach().requires_grad_() if t is x or t is r or t is gate else t for t in arguments]
        opcheck(getattr(operators, name).default, tuple(wanting))
        opcheck(getattr(operators, name).default, arguments)
        opcheck(getattr(operators, f"{name}_forward").default, (*arguments, keep_mask))
    y, stats, stats_r, mask = operators.bn_act_forward(*bn, keep_mask)
    slope = (None, mask) if keep_mask else (y, None)
    saved = (*slope, x, weight, bias, stats, r, weight, bias, stats_r, gate, 1, 1, 1)
    for needs in ([True] * 7, [False] * 7, [True, False, True, False, True, False, True]):
        opcheck(operators.bn_act_backward.default, (torch.randn_like(y), *saved, needs))
        if hasattr(operators, "bn_act_backward_"):
            opcheck(operators.bn_act_backward_.default, (torch.randn_like(y), *saved, needs))
    if hasattr(operators, "bn_act_backward_"):  # what isn't given has a gradient of its own
        none, nothing = [None] * 3, kernels.nothing(y)
        absent = (*slope, *none, nothing, *none, nothing, None, 0, 0, 1)
        needs = [True, False, False, True, False, False, False]
        opcheck(operators.bn_act_backward_.default, (torch.randn_like(y), *absent, needs))


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("keep_mask", [False, True])
def test_gradients_are_in_the_forwards_order_whatever_order_dy_has(
    kernel_backend: str, keep_mask: bool, order: torch.memory_format
) -> None:
    """An identity residual is not saved: nothing but the mask, or y, tells its order."""
    operators = getattr(torch.ops, f"fusedres_{kernel_backend}")
    (other,) = {torch.contiguous_format, torch.channels_last} - {order}
    x, r = (torch.randn(2, 3, 4, 5).to(memory_format=order) for _ in range(2))
    sources, plain = (Statistics.BATCH.value, Statistics.ABSENT.value), (None, None, None)
    absent = (r, None, None, None, None, None)
    bn = operators.bn_act_forward(x, None, None, None, None, *absent, *sources, 0.1, 0.1, 1e-5, 1e-5, 1, keep_mask)
    affine = operators.affine_act_forward(x, None, None, None, r, *plain, None, 1, keep_mask)
    slopes = [(None, mask) if keep_mask else (y, None) for y, *_, mask in (bn, affine)]
    dy = torch.randn(2, 3, 4, 5).to(memory_format=other)
    of_bn = (dy, *slopes[0], x, None, None, bn[1], *plain, bn[2], None, *sources, 1, [True] * 4 + [False] * 3)
    of_affine = (dy, *slopes[1], *(None,) * 9, 1, [True, False, False, True, False, False, False])
    for operator, arguments in ((operators.bn_act_backward, of_bn), (operators.affine_act_backward, of_affine)):
        torch.library.opcheck(operator.default, arguments, test_utils="test_faketensor")
        gradients = operator(*arguments)
        assert gradients[0].is_contiguous(memory_format=order) and gradients[3].is_contiguous(memory_format=order)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_outputs_and_gradients_have_eagers_strides(fused_backend: str, layout: str) -> None:
    for shape in testing.SHAPES:
        case = testing.Case(
            "bn_act", torch.float32, layout, shape, "normal", "training", "plain", "none", "relu", "all", 1
        )
        given = testing.operands(case)
        ours, theirs = (
            numerics.results(testing.candidate, case, given),
            numerics.results(testing.eager, case, given),
        )
        assert strides(ours["y"]) == strides(kernels.empty_output(given.x)) == strides(theirs["y"])
        assert strides(ours["dx"]) == strides(theirs["dx"])


def strides(t: Tensor) -> list[int]:
    """Those that place elements: a dimension of size 1 may carry any."""
    return [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1]


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dynamo_backend", ["aot_eager", "inductor"])
def test_fullgraph_compilation_moves_the_statistics_once(
    fused_backend: str, dynamo_backend: str, order: torch.memory_format
) -> None:
    torch._dynamo.reset()
    x = torch.randn(2, 5, 4, 4).to(memory_format=order).requires_grad_()
    r = torch.randn(2, 5, 4, 4).to(memory_format=order).requires_grad_()
    weight, bias = torch.rand(5, requires_grad=True), torch.rand(5, requires_grad=True)

    def f(x: Tensor, r: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return bn_act(x, Norm(weight, bias, mean, var, training=True), residual=r)

    found = []
    for run in (f, torch.compile(f, fullgraph=True, backend=dynamo_backend)):
        mean, var = torch.zeros(5), torch.ones(5)
        y = run(x, r, mean, var)
        found.append([y, mean, var, *torch.autograd.grad(y.square().sum(), [x, r, weight, bias])])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager)
        assert compiled.stride() == eager.stride()


def test_half_inputs_take_fp32_parameters_and_give_them_fp32_gradients(fused_backend: str) -> None:
    x = torch.randn(4, 3, 2, 2).bfloat16().requires_grad_()
    r = torch.randn(4, 3, 2, 2, requires_grad=True)
    weight = torch.rand(3, requires_grad=True)
    y = bn_act(x, Norm(weight, training=True), residual=r)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16  # type: ignore[union-attr]
    assert r.grad.dtype == weight.grad.dtype == torch.float32  # type: ignore[union-attr]


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (2, 3, 2, 3, 2), (0, 3, 2, 2)])
def test_any_number_of_dimensions_and_empty_batches_are_eagers(fused_backend: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    weight, bias = torch.rand(3, requires_grad=True), torch.rand(3, requires_grad=True)
    y = bn_act(x, Norm(weight, bias, training=True), residual=x)
    expected = torch.relu(torch.nn.functional.batch_norm(x, None, None, weight, bias, True) + x)
    torch.testing.assert_close(y, expected)
    for ours, eager in zip(*(torch.autograd.grad(t.sum(), [x, weight, bias]) for t in (y, expected)), strict=True):
        torch.testing.assert_close(ours, eager, atol=1e-5, rtol=1e-5)


X = torch.randn(2, 3, 4, 4)
RUNNING = (torch.zeros(3), torch.ones(3))
BAD_INPUT = {
    "x must be a floating-point tensor, got torch.int64; convert": lambda: affine_act(X.long()),
    "x must be .N, C, .*, got .2,.; add a batch dimension": lambda: affine_act(X[:, 0, 0, 0]),
    "residual must match x: expected .2, 3, 4, 4., got .2, 3, 4, 1.; project": lambda: affine_act(
        X, residual=X[..., :1]
    ),
    "residual must be a floating-point tensor on cpu, got torch.int64": lambda: affine_act(X, residual=X.long()),
    "residual must be .* on cpu, got torch.float32 on meta": lambda: affine_act(X, residual=X.to("meta")),
    "gate must be .1 or N, 1 or C, 1, .*got .2, 3, 4, 1.": lambda: affine_act(X, gate=X[..., :1]),
    "gate must be .* got .3,.": lambda: affine_act(X, gate=torch.rand(3)),
    "gate must be a floating-point tensor": lambda: affine_act(X, gate=torch.ones(2, 1, 1, 1, dtype=torch.int32)),
    "affine must hold one floating-point value per channel of x: expected .3,. on cpu, got .4,.": lambda: affine_act(
        X, Affine(torch.rand(4))
    ),
    "residual_affine was given without a residual; pass residual=": lambda: affine_act(
        X, residual_affine=Affine(torch.rand(3))
    ),
    "norm must hold .* got .3,. torch.float32 on meta": lambda: bn_act(
        X, Norm(torch.rand(3, device="meta"), None, *RUNNING)
    ),
    "norm must hold .* got .3,. torch.int64": lambda: bn_act(X, Norm(torch.ones(3).long(), None, *RUNNING)),
    "norm must have running_mean and running_var unless training=True": lambda: bn_act(X, Norm()),
    "Expected more than 1 value per channel when training": lambda: bn_act(X[:1, :, :1, :1], Norm(training=True)),
    "act must be one of identity, relu.* got 'swish'": lambda: affine_act(X, act="swish"),
}


@pytest.mark.parametrize("message", BAD_INPUT)
def test_bad_input_gets_the_rule_what_came_and_the_remedy(fused_backend: str, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        BAD_INPUT[message]()


def test_nothing_is_modified_before_the_check_passes(fused_backend: str) -> None:
    mean, var = torch.zeros(3), torch.ones(3)
    with pytest.raises(ValueError, match="residual must match"):
        bn_act(X, Norm(None, None, mean, var, training=True), residual=X[:1])
    assert mean.eq(0).all() and var.eq(1).all()

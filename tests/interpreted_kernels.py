"""Tests of the Triton kernels in its interpreter; `test_triton_interpreted.py` runs them in a process of their own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from interpreted import INTERPRETED
from interpreted_mutants import MUTANTS, POOL_MUTANTS
from test_bn_act_pool import DTYPES, ORDERS, WINDOWS, require_the_same_as_pooling_the_activation
from triton.runtime.interpreter import InterpreterBuilder

import fusedres
from fusedres import numerics, testing
from fusedres.backends import Statistics, Window
from fusedres.backends.triton import launch
from fusedres.backends.triton.arguments import Cut
from fusedres.backends.triton.masks import _bytes_of
from fusedres.backends.triton.tiles import offsets_at, offsets_of, place_of
from fusedres.epilogue import CATALOGUE, Activation
from fusedres.ops import Norm, affine_act, bn_act, kernels

pytestmark = [
    pytest.mark.usefixtures("interpreted"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, at the infinities and NaN of the cases
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),  # of Triton 3.6
]
COUNT, POOL_COUNT = 400, 64


@pytest.fixture(scope="module")
def interpreted():
    fusedres.ops.register_backend(INTERPRETED)
    with fusedres.use_backend("interpreted"):
        yield
    fusedres.ops.unregister_backend(INTERPRETED)


def served_cases() -> list[testing.Case]:
    """Cases that the kernels take; what they object to is looked at in test_triton.py."""
    served = [
        case
        for case in testing.cases(8 * COUNT, large=0)
        if case.layout in ("contiguous", "channels_last") and case.residual not in ("other layout", "stride 0")
    ]
    return served[:: len(served) // COUNT][:COUNT] + served_pool_cases()


def served_pool_cases() -> list[testing.Case]:
    """Of those with a value class and dtype of its own, each in one of the layouts and modes."""
    served = [case for case in testing.pool_cases() if case.layout in ("contiguous", "channels_last")]
    return served[:: len(served) // POOL_COUNT][:POOL_COUNT]


@pytest.fixture(scope="module")
def comparisons(interpreted) -> list[numerics.Comparison]:
    return [comparison for case in served_cases() for comparison in numerics.compare(case)]


def test_every_quantity_of_every_shared_case_is_within_the_bar(comparisons: list[numerics.Comparison]) -> None:
    assert not [comparison for comparison in comparisons if comparison.fails_alone()]


def test_pooled_errors_are_within_the_bar(comparisons: list[numerics.Comparison]) -> None:
    """Pooled over layouts and value classes too: there are few cases of each group."""
    pooled = [replace(row, case=replace(row.case, layout="", values="")) for row in comparisons]
    assert not [pool for pool in numerics.pools(pooled) if pool.fails()]


@pytest.mark.parametrize("row", CATALOGUE, ids=lambda row: row.name)
def test_every_activation_of_the_catalogue_is_its_formula(row: Activation) -> None:
    kinks = [0.0, -0.0, 3.0, -3.0, 6.0, float("inf"), float("nan")]
    special = torch.tensor(kinks if row.from_output else kinks[:5], dtype=torch.float64)
    z = torch.cat([torch.randn(120, dtype=torch.float64) * 4, special]).view(1, -1).requires_grad_()
    expected, found = row.formula(z), affine_act(z, act=row)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, equal_nan=True)
    dy = torch.randn_like(z)
    gradients = (torch.autograd.grad(y, z, dy)[0] for y in (found, expected))
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_a_masked_nan_gradient_is_zero_and_relu_keeps_nan(interpreted) -> None:
    x = torch.tensor([[-1.0, 2.0, float("nan")]], requires_grad=True)
    for residual in (None, torch.zeros(1, 3)):
        y = affine_act(x, residual=residual)
        assert y.isnan().tolist() == [[False, False, True]]
        (dx,) = torch.autograd.grad(y, x, torch.tensor([[float("nan"), 1.0, 1.0]]))
        assert dx.tolist() == [[0.0, 1.0, 1.0]]


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_a_gradient_of_any_strides_is_taken(order: torch.memory_format) -> None:
    x, r = (torch.randn(2, 4, 3, 2).contiguous(memory_format=order).requires_grad_() for _ in range(2))
    running = torch.zeros(4), torch.ones(4)
    dys = torch.ones(()).expand(x.shape), torch.randn(2, 4, 3, 2), torch.randn(3, 2, 4, 2).permute(3, 2, 0, 1)
    for dy in dys:
        results = []
        for backend in ("interpreted", "reference"):
            with fusedres.use_backend(backend):
                y = bn_act(x, Norm(None, None, *running), residual=r)
                results.append(torch.autograd.grad(y, (x, r), dy))
        torch.testing.assert_close(*results)


def test_the_same_call_gives_the_same_bits(interpreted) -> None:
    def run() -> list[torch.Tensor]:
        torch.manual_seed(1)
        x, r = torch.randn(2, 3, 40, 40, requires_grad=True), torch.randn(2, 3, 40, 40, requires_grad=True)
        weight = torch.rand(3, requires_grad=True)
        y = bn_act(x, Norm(weight, training=True), residual=r)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), (x, r, weight))]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0])
def test_running_statistics_move_once(momentum: float) -> None:
    x, (mean, var) = torch.randn(3, 5, 4, 4), (torch.randn(5), torch.rand(5))
    expected = mean.clone(), var.clone()
    bn_act(x, Norm(None, None, mean, var, True, momentum))
    torch.nn.functional.batch_norm(x, *expected, training=True, momentum=momentum)
    torch.testing.assert_close((mean, var), expected)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("keep_mask", [False, True])
def test_the_results_have_the_fakes_shapes_and_strides(keep_mask: bool, order: torch.memory_format) -> None:
    operators, opcheck = torch.ops.fusedres_interpreted, torch.library.opcheck
    x, r = (torch.randn(2, 3, 4, 5).to(memory_format=order) for _ in range(2))
    weight, bias, mean, var = torch.rand(3), torch.rand(3), torch.zeros(3), torch.ones(3)
    scalars = (Statistics.BATCH.value, Statistics.RUNNING.value, 0.1, 0.2, 1e-5, 1e-4, 1)
    gate = torch.rand(2, 1, 1, 1)
    bn = (x, weight, bias, mean, var, r, weight, bias, mean.clone(), var.clone(), gate, *scalars)
    opcheck(operators.bn_act_forward.default, (*bn, keep_mask), test_utils=("test_schema", "test_faketensor"))
    y, stats, stats_r, mask = operators.bn_act_forward(*bn, keep_mask)
    slope = (None, mask) if keep_mask else (y, None)
    saved = (*slope, x, weight, bias, stats, r, weight, bias, stats_r, gate, 1, 2, 1)
    for needs in ([True] * 7, [False] * 7, [True, False, True, False, True, False, True]):
        arguments = (torch.randn_like(y), *saved, needs)
        opcheck(operators.bn_act_backward.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_masks_are_laid_out_as_every_backend_lays_them_out(interpreted) -> None:
    from python_backend import affine_act_forward

    for shape in ((2, 3, 5, 5), (3, 35, 1, 1), (2, 16, 4, 4)):
        for order in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(shape).contiguous(memory_format=order)
            arguments = (x, *[None] * 8, 1, True)
            found, expected = (
                torch.ops.fusedres_interpreted.affine_act_forward(*arguments),
                affine_act_forward(*arguments),
            )
            assert torch.equal(found[1], expected[1]) and found[1].shape == kernels.empty_mask(x, True).shape


@pytest.mark.parametrize("act", ["relu", "identity"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pooling_is_that_of_the_activation(
    interpreted, dtype: torch.dtype, order: torch.memory_format, act: str
) -> None:
    """Few and many channels, planes of several tiles; every shape with every window in turn."""
    turn = 2 * DTYPES.index(dtype) + (act == "relu")
    for index, shape in enumerate(((2, 3, 7, 6), (1, 35, 5, 9), (1, 1, 21, 15), (1, 70, 4, 3))):
        window = WINDOWS[(index + turn) % len(WINDOWS)]
        require_the_same_as_pooling_the_activation(shape, window, dtype, order, act)


@pytest.mark.parametrize("order", ORDERS)
def test_a_pools_results_have_the_fakes_shapes_and_strides(order: torch.memory_format) -> None:
    operators = torch.ops.fusedres_interpreted
    for shape, window in (((2, 3, 6, 5), WINDOWS[0]), ((2, 16, 1, 1), ((2, 2), (1, 1), (1, 1)))):
        x = torch.randn(shape).contiguous(memory_format=order)
        weight, bias, mean, var = (torch.rand(shape[1]) for _ in range(4))
        rest = (weight, bias, mean, var, Statistics.BATCH.value, 0.1, 1e-5, *window, 1)
        checks = ("test_schema", "test_faketensor")
        for keep_choice in (False, True):
            torch.library.opcheck(operators.bn_act_pool_forward.default, (x, *rest, keep_choice), test_utils=checks)
        y, stats, choice = operators.bn_act_pool_forward(x, *rest, True)
        for needs in ([True] * 3, [False] * 3, [True, False, True]):
            saved = (torch.randn_like(y), choice, x, weight, stats, Statistics.BATCH.value, *window, needs)
            torch.library.opcheck(operators.bn_act_pool_backward.default, saved, test_utils=checks)


FAR = {  # images, pixels, channels and the order; the first element of the last tile is beyond 2^31
    "channels_last": (1, 70000 * 1024, 64, True),
    "images of channels_last": (70000, 1024, 64, True),
    "contiguous": (70000, 1024, 64, False),
    "one plane": (1, 2**33, 1, False),
}


@triton.jit
def far_offsets(offsets_ptr, tile, tiles, pixels, channels, CUT: tl.constexpr):
    """Of a tile's elements, the same by pixel, and of their mask's bytes."""
    place = place_of(tile, tiles, 0, pixels, channels, CUT)
    pixel, channel = tl.arange(0, CUT.block_p), tl.arange(0, CUT.block_c)
    at = offsets_ptr + pixel[:, None] * CUT.block_c + channel[None, :]
    tl.store(at, offsets_of(place, CUT))
    tl.store(at + 64, offsets_at(place.first_pixel + pixel, place, pixels, CUT))
    offsets, _ = _bytes_of(place, CUT)
    tl.store(offsets_ptr + 128 + tl.arange(0, 8), tl.reshape(offsets, (8,)))


@pytest.mark.parametrize("name", FAR)
def test_offsets_pass_2_to_the_31(name: str) -> None:
    images, pixels, channels, channels_last = FAR[name]
    block = 8  # both ways: 64 elements, and 8 bytes of their mask
    tiles = images * (pixels // block)
    cut = Cut(*map(tl.constexpr, (channels_last, tl.float32, block, block, 1, 16)))
    found = torch.zeros(64 + 64 + 8, dtype=torch.int64)
    launch.launch(far_offsets, (1,), (found, tiles - 1, tiles, pixels, channels), {"CUT": cut}, 1)
    pixel, channel = torch.arange(pixels - block, pixels)[:, None], torch.arange(block)[None, :]
    steps = (channels, 1) if channels_last else (1, pixels)
    expected = (images - 1) * pixels * channels + pixel * steps[0] + channel * steps[1]
    assert expected.min() > 2**31
    for offsets in found[:128].chunk(2):
        assert torch.equal(offsets.view(block, block), expected)
    # The rows begin on whole bytes: a byte lies at an eighth of its first element.
    octets = expected[:, 0] if channels_last else expected[0]
    assert torch.equal(found[128:], octets // 8)


@pytest.mark.parametrize("order", ORDERS)
def test_second_passes_go_through_memory_backwards(order: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    """They begin with what the first passes read last, which caches still hold."""
    stored: list[int] = []
    store = InterpreterBuilder.create_masked_store

    def watch(builder, pointers, value, mask, *rest) -> None:
        stored.append(int(pointers.data[mask.data].min()) if mask.data.any() else 0)
        store(builder, pointers, value, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", watch)
    channels = 1 if order == torch.contiguous_format else 32  # of one block: others are gone through in between
    x = torch.randn(16, channels, 64, 64).contiguous(memory_format=order).requires_grad_()
    y = bn_act(x, Norm(training=True))
    (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
    for t in (y.detach(), dx):
        inside = [at for at in stored if t.data_ptr() <= at < t.data_ptr() + t.nbytes]
        assert len(inside) > 8 and inside == sorted(inside, reverse=True)


@pytest.mark.parametrize("order", ORDERS)
def test_fullgraph_compilation_gives_the_same_bits_and_moves_the_statistics_once(order: torch.memory_format) -> None:
    torch._dynamo.reset()
    x, r = (torch.randn(2, 5, 4, 4).to(memory_format=order).requires_grad_() for _ in range(2))
    weight, bias = torch.rand(5, requires_grad=True), torch.rand(5, requires_grad=True)

    def f(x: torch.Tensor, r: torch.Tensor, mean: torch.Tensor, var: torch.Tensor) -> torch.Tensor:
        return bn_act(x, Norm(weight, bias, mean, var, training=True), residual=r)

    found = []
    for run in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        mean, var = torch.zeros(5), torch.ones(5)
        y = run(x, r, mean, var)
        found.append([y, mean, var, *torch.autograd.grad(y.square().sum(), [x, r, weight, bias])])
    for eager, compiled in zip(*found, strict=True):
        assert torch.equal(eager, compiled) and eager.stride() == compiled.stride()


def mutation_cases() -> list[testing.Case]:
    """Few cases that together meet every function of the kernels; those that most mutants fail come first."""
    base = testing.Case(
        "bn_act",
        torch.float32,
        "channels_last",
        (3, 35, 6, 4),
        "mean1",
        "training",
        "projection",
        "both",
        "relu",
        "all",
        1,
    )
    return [
        base,
        replace(base, mode="eval", residual="plain"),
        replace(base, layout="contiguous", shape=(5, 16, 3, 11), values="mean1e4"),
        replace(base, residual="none", gate="none", act="leaky_relu", values="mean1e7"),
    ]


def pool_mutation_cases() -> list[testing.Case]:
    """The same for pooling."""
    base = replace(mutation_cases()[0], op="bn_act_pool", residual="none", gate="none", window=Window(*WINDOWS[0]))
    return [base, replace(base, layout="contiguous", shape=(5, 16, 3, 11), values="mean1e4")]


@pytest.fixture(scope="module")
def yardsticks() -> dict[testing.Case, numerics.Yardstick]:
    """What eager computes of each case, once for all mutants."""
    return {case: numerics.yardstick(case) for case in mutation_cases() + pool_mutation_cases()}


def failures(yardsticks: dict[testing.Case, numerics.Yardstick], pool: bool) -> Iterator[numerics.Comparison]:
    for case, yardstick in yardsticks.items():
        if (case.window is not None) == pool:
            yield from (row for row in numerics.compare(case, beside=yardstick) if row.fails_alone())


@pytest.mark.parametrize("pool", [False, True], ids=["bn_act", "bn_act_pool"])
def test_the_right_kernels_pass_the_mutation_cases(interpreted, yardsticks, pool: bool) -> None:
    assert not list(failures(yardsticks, pool))


@pytest.mark.parametrize(
    "mutant, places, pool",
    [
        pytest.param(mutant, places, pool, id=f"{mutant.__name__}-{'pool' if pool else 'bn_act'}")
        for pool, mutants in ((False, MUTANTS), (True, POOL_MUTANTS))
        for mutant, places in mutants.items()
    ],
)
def test_a_wrong_kernel_fails(mutant, places, pool: bool, yardsticks, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in places:
        monkeypatch.setattr(module, name, mutant)
    try:
        failed = next(failures(yardsticks, pool), None)
    except Exception as error:  # the interpreter wraps what a kernel raises in an exception of its own
        failed = "outside the tensors of its launch" in str(error)
    assert failed

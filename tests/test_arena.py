"""Where an optimized model's intermediate results lie: what shares memory, what never does, and who holds it."""

from __future__ import annotations

import copy
import gc
import mmap
import random
import resource
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

import pytest
import torch
from optimized import assert_close, batch, make, optimized
from torch import Tensor, nn
from torch.profiler import profile
from torchvision_models import resnet

import fusedres
from fusedres import inference
from fusedres.inference import arena
from fusedres.inference.arena import Life
from fusedres.inference.program import Program

pytestmark = pytest.mark.usefixtures("native")


def network() -> nn.Module:
    """Every step but the last three is the plan's own: a pool, an identity and a projection block."""
    return make(lambda: resnet.ResNet(resnet.BasicBlock, [2, 1, 1, 1], num_classes=7))


def program_of(model: nn.Module) -> Program:
    (program,) = inference._programs[model].values()
    return program


def called(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def test_what_is_needed_at_the_same_time_lies_apart() -> None:
    generator = random.Random(0)
    for _ in range(200):
        spans = [sorted(generator.choices(range(12), k=2)) for _ in range(generator.randint(1, 15))]
        lives = [Life(key, generator.randint(1, 500), *span) for key, span in enumerate(spans)]
        places, size = arena.places(lives)
        for life in lives:
            assert places[life.key] % 64 == 0 and places[life.key] + life.bytes <= size
        for one, other in combinations(lives, 2):
            if one.begin <= other.end and other.begin <= one.end:
                begin, end = places[one.key], places[one.key] + one.bytes
                assert end <= places[other.key] or places[other.key] + other.bytes <= begin


def test_what_is_not_needed_any_more_makes_room() -> None:
    chain = [Life(slot, 100, slot, slot + 1) for slot in range(10)]
    places, size = arena.places(chain)
    assert size == 228 and set(places.values()) == {0, 128}
    assert arena.places([]) == ({}, 0)


def test_a_networks_arena_is_as_large_as_the_most_that_lives_at_once() -> None:
    model, _ = optimized(network())
    called(model, batch(64))
    stem, pooled = 2 * 64 * 32 * 32 * 4, 2 * 64 * 16 * 16 * 4
    assert program_of(model).latest.bytes == stem + pooled  # the compiled pool has no positions


def allocated(model: nn.Module, x: Tensor) -> int:
    """The bytes that a call asks the allocator for."""
    with torch.no_grad(), profile(profile_memory=True) as profiled:
        model(x)
    return sum(max(0, event.self_cpu_memory_usage) for event in profiled.events())


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("order", [torch.channels_last, torch.contiguous_format], ids=str)
def test_the_second_call_asks_for_no_memory_but_its_input_converted_and_its_outputs(
    order: torch.memory_format, autocast: bool
) -> None:
    model, _ = optimized(network())
    x = batch(64).contiguous(memory_format=order)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        called(model, x)
        asked = allocated(model, x)
    converted = (order is torch.contiguous_format) * x.nbytes + autocast * x.nbytes // 2
    head = 4 * 2 * (512 + 512 + 7)  # the last pool, and the linear layer's result
    assert converted <= asked <= converted + head + 1024 < converted + x.nbytes


def fresh_pages(call: Callable[[], object]) -> int:
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    call()
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before


def test_the_second_call_takes_no_fresh_pages() -> None:
    model, _ = optimized(make(stem(nn.AdaptiveAvgPool2d(1))))
    x = torch.randn(9, 3, 256, 256).contiguous(memory_format=torch.channels_last)
    called(model, x)
    fresh = fresh_pages(lambda: mmap.mmap(-1, 1 << 22).write(b"1" * (1 << 22)))
    assert fresh_pages(lambda: called(model, x)) < 100 < fresh


def test_many_calls_hold_as_much_as_one() -> None:
    model, _ = optimized(network())
    for size in (32, 64, 40, 64, 32, 64):
        for _ in range(3):
            called(model, batch(size))
    (held,) = program_of(model)._arenas
    most = max(plan.bytes for plan in program_of(model)._plans.values())
    assert held._memory.numel() == most


def test_the_places_are_warm_from_call_to_call() -> None:
    model, _ = optimized(network())
    called(model, batch(64)), called(model, batch(64))
    (held,) = program_of(model)._arenas
    memory = held._memory.data_ptr()
    for _ in range(3):
        called(model, batch(64))
        assert program_of(model)._arenas == [held] and held._memory.data_ptr() == memory


class Keeps(nn.Module):
    """Remembers what it was given."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return x


def stem(*more: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), resnet.BasicBlock(16, 16), *more)


ENDS: dict[str, Callable[[], nn.Module]] = {
    "a convolution": stem(nn.Conv2d(16, 16, 1)),
    "a block": stem(resnet.BasicBlock(16, 16)),
    "a view": stem(nn.Flatten()),
    "an identity": stem(nn.Identity()),
    "a pool": stem(nn.MaxPool2d(2)),
    "a slice": stem(nn.Conv2d(16, 16, 1), nn.Unflatten(1, (4, 4)), nn.Flatten(0, 1)),
    "the network": network,
}


@pytest.mark.parametrize("end", ENDS)
def test_no_output_is_written_to_by_a_later_call(end: str) -> None:
    model = make(ENDS[end])
    ours, _ = optimized(model)
    inputs = [batch(32) for _ in range(4)]
    found = [called(ours, x) for x in inputs]
    assert len({y.untyped_storage().data_ptr() for y in found}) == 4
    for y, x in zip(found, inputs, strict=True):
        assert_close(y, model, x)


def test_what_a_module_or_a_hook_keeps_is_not_written_to() -> None:
    model = make(stem(Keeps(), nn.Conv2d(16, 16, 1), nn.MaxPool2d(2), resnet.BasicBlock(16, 16), nn.Flatten()))
    kept: list[Tensor] = []
    model[5].register_forward_hook(lambda module, given, y: kept.extend((*given, y)))
    ours, report = optimized(model)
    assert [line.in_place for line in report.lines][-3:] == [False, False, False]
    x = batch(16)
    for _ in range(3):
        kept.clear()
        called(ours, x)
        seen, (given, pooled) = ours[3].seen.clone(), [t.clone() for t in kept]
        first = ours[3].seen, *kept
        called(ours, batch(16))
        assert all(torch.equal(*pair) for pair in zip(first, (seen, given, pooled), strict=True))


class Crops(nn.Module):
    """Its size is nobody's business but its own."""

    def __init__(self) -> None:
        super().__init__()
        self.size = [9]

    def forward(self, x: Tensor) -> Tensor:
        if self.size[0] < 0:
            raise ValueError("no size")
        return x[..., : self.size[0], : self.size[0]]


def test_a_module_that_gives_another_size_than_before_is_no_harm() -> None:
    model = make(stem(Crops(), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten()))
    ours, _ = optimized(model)
    ours[3].size = model[3].size
    for size in (9, 9, 12, 5, 9, 20):
        model[3].size[0] = size
        x = batch(16)
        assert_close(called(ours, x), model, x)
    model[3].size[0] = -1
    with pytest.raises(ValueError, match="no size"):
        called(ours, x)
    model[3].size[0] = 9
    assert_close(called(ours, x), model, x)
    assert len(program_of(ours)._arenas) == 1


def test_eight_threads_have_memory_of_their_own() -> None:
    model, _ = optimized(network())
    inputs = [batch(40 if i % 4 else 32) for i in range(64)]
    expected = [called(model, x) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda x: called(model, x), inputs))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert 1 <= len(program_of(model)._arenas) <= 8


class Again(nn.Module):
    """Calls another model on the way."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.other = [other]

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 1:
            self.other[0](x[:1, :3])
        return x


def test_a_call_within_a_call_has_memory_of_its_own() -> None:
    again = Again(nn.Identity())
    model = make(stem(again, resnet.BasicBlock(16, 16), nn.Flatten()))
    ours, _ = optimized(model)
    ours[3].other[0] = ours
    model[3].other[0] = nn.Identity()
    for _ in range(3):
        x = batch(8)
        assert_close(called(ours, x), model, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_plan_of_inference_mode_serves_outside_of_it(dtype: torch.dtype) -> None:
    model = network()
    ours, _ = optimized(model)
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode, torch.no_grad):
        x = batch(32)
        with mode(), torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            assert not torch.isnan(ours(x)).any()
            assert not torch.isnan(ours(x)).any()  # the second call lays the plan into memory
    with torch.no_grad():
        assert_close(ours(x), model, x)


def test_unoptimize_and_a_change_give_the_memory_back() -> None:
    model, _ = optimized(network())

    def memory() -> weakref.ref[Tensor]:
        x = batch(32)
        called(model, x), called(model, x)
        (held,) = program_of(model)._arenas
        return weakref.ref(held._memory)

    before = memory()
    with torch.no_grad():
        model.conv1.weight.mul_(2)
    after = memory()
    gc.collect()
    assert before() is None and after() is not None
    fusedres.unoptimize(model)
    gc.collect()
    assert after() is None


def test_plans_for_ever_new_sizes_are_not_kept_for_ever() -> None:
    model, _ = optimized(make(stem(nn.Flatten())))
    for height in range(1, 50):
        for _ in range(2):
            called(model, torch.randn(1, 3, height, 5))
    program = program_of(model)
    assert len(program._plans) == 32 and (1, 3, 49, 5) in program._plans
    assert len(program._arenas[0]._tapes) <= 32


def test_the_report_tells_the_arenas_size() -> None:
    model = network()
    assert fusedres.optimize(copy.deepcopy(model)).arena_bytes is None
    report = fusedres.optimize(model, example=batch(64))
    assert report.arena_bytes == program_of(model).latest.bytes
    assert str(report).endswith(f"plain steps, {report.arena_bytes / 2**20:.1f} MiB for what lies between them")


def operands(images: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, the packed weight, a bias, a residual of a 3x3 convolution with padding."""
    x, residual = (
        torch.randn(images, channels, 9, 7).contiguous(memory_format=torch.channels_last) for channels in (8, 20)
    )
    packed = torch.ops.fusedres_native.conv_act_pack(torch.randn(20, 8, 3, 3), 1, 4)
    return x, packed, torch.randn(20), residual


WINDOWS = ((1, 1), (1, 1), (1, 1), 1, 1)


@pytest.mark.parametrize("joins", [False, True])
def test_the_operator_writes_into_what_it_is_given(joins: bool) -> None:
    x, packed, bias, residual = operands()
    operators, given = torch.ops.fusedres_native, (x, packed, bias, None, residual if joins else None, *WINDOWS)
    y = torch.empty_like(residual)
    operators.conv_act_out(*given, y)
    assert torch.equal(y, operators.conv_act(*given))
    torch.library.opcheck(operators.conv_act_out.default, (*given, torch.zeros_like(residual)))
    if joins:
        operators.conv_act_out(*given, residual)
        assert torch.equal(y, residual)


@pytest.mark.parametrize("dim", range(4))
def test_the_operator_refuses_a_result_of_other_sizes(dim: int) -> None:
    x, packed, bias, residual = operands()
    sizes = list(residual.shape)
    sizes[dim] += 1
    for y, message in (
        (torch.empty(sizes).contiguous(memory_format=torch.channels_last), "y must have the sizes and the dtype"),
        (torch.empty(residual.shape), "y must be in channels_last"),
        (torch.empty_like(residual, dtype=torch.bfloat16), "y must have the sizes and the dtype"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.fusedres_native.conv_act_out(x, packed, bias, None, None, *WINDOWS, y)

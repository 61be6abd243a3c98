"""An optimized model's calls that need no Python between them are recorded, and replayed as one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from optimized import make
from torch import Tensor, nn
from torch.profiler import profile
from torchvision_models import resnet

import fusedres
from fusedres.backends import Convolution, Filter, Geometry, Head, native
from fusedres.epilogue import RELU

pytestmark = pytest.mark.usefixtures("native")

OPERATORS = torch.ops.fusedres_native


def convolution() -> Convolution:
    found = native.BACKEND.convolution
    assert found is not None
    return found


def pixels(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(sizes).to(dtype).contiguous(memory_format=torch.channels_last)


def chain(x: Tensor) -> tuple[list[Callable[[], object]], list[Tensor]]:
    """A call of every kind that is recorded, each of what the one before wrote, and what they write."""
    ours, dtype = convolution(), x.dtype
    taps = ours.pack(Filter(torch.randn(24, 5, 3, 3).to(dtype)), Geometry(padding=(1, 1)), x.shape, False)
    more = ours.pack(Filter(torch.randn(24, 24, 1, 1).to(dtype), torch.randn(24)), Geometry(), (2, 24, 4, 4), True)
    z, pooled, y = pixels(2, 24, 8, 8, dtype=dtype), pixels(2, 24, 4, 4, dtype=dtype), pixels(2, 24, 4, 4, dtype=dtype)
    mean = pixels(2, 24, 1, 1)
    assert ours.prepare is not None and ours.max_pool is not None and isinstance(ours.head, Head)
    calls = [
        ours.prepare(x, taps, None, Geometry(padding=(1, 1)), RELU, z),
        ours.max_pool(z, [2, 2], [2, 2], [0, 0], pooled),
        ours.prepare(pooled, more, y, Geometry(), RELU, y),  # over the residual
        ours.head.prepare_mean(y, mean),
    ]
    return calls, [z, pooled, y, mean]


def join(calls: list[Callable[[], object]]) -> Callable[[], object]:
    return calls[0].join(calls)  # pyright: ignore[reportFunctionMemberAccess]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_replay_computes_what_the_calls_do_of_what_then_lies_there(dtype: torch.dtype) -> None:
    x = pixels(2, 5, 8, 8, dtype=dtype)
    calls, results = chain(x)
    before = [t.clone() for t in results]
    replay = join(calls)
    assert all(map(torch.equal, results, before)), "recording computed"
    for _ in range(2):
        x.copy_(pixels(*x.shape, dtype=dtype))
        found = []
        for run in (replay, lambda: [call() for call in calls]):
            for t, value in zip(results, before, strict=True):
                t.copy_(value)
            run()
            found.append([t.clone() for t in results])
        assert all(map(torch.equal, *found))
        assert not any(map(torch.equal, found[0], before))


def test_a_recording_holds_what_it_points_to() -> None:
    calls, results = chain(pixels(2, 5, 8, 8))
    replay, y = join(calls), results[-2].zero_()
    replay()
    expected = y.clone()
    del calls, results
    filler = [torch.full((n,), torch.nan) for n in range(100, 20000, 50)]  # over what was freed
    y.zero_()
    replay()
    assert filler and torch.equal(y, expected)


def test_a_call_that_is_refused_ends_the_recording() -> None:
    calls, (z, *_) = chain(pixels(2, 5, 8, 8))
    too_small = pixels(2, 24, 7, 8)
    ours = convolution()
    assert ours.max_pool is not None
    with pytest.raises(RuntimeError, match="max_pool: y doesn't belong to these windows of x"):
        join([calls[0], ours.max_pool(too_small, [9, 9], [9, 9], [0, 0], pixels(2, 24, 2, 2))])
    before = z.clone()
    calls[0]()
    assert not torch.equal(z, before), "the thread records still"
    with pytest.raises(RuntimeError, match="this thread records nothing"):
        OPERATORS.record_end(z)


def test_other_threads_compute_while_one_records() -> None:
    calls, (z, *_) = chain(pixels(2, 5, 8, 8))
    before = z.clone()
    OPERATORS.record_begin(z)
    try:
        with ThreadPoolExecutor(1) as other:
            other.submit(calls[0]).result()
        assert not torch.equal(z, before)
    finally:
        assert OPERATORS.record_end(z).numel() == 0


def chain_of(*between: nn.Module) -> nn.Module:
    ends = [nn.Conv2d(n, 16, 1) for n in (3, 16, 16)], [nn.Conv2d(16, 16, 1) for _ in range(4)]
    return nn.Sequential(*ends[0], *between, *ends[1])


@pytest.mark.parametrize(
    "build, recordings, alone",
    [
        (lambda: resnet.ResNet(resnet.BasicBlock, [2, 1, 1, 1], num_classes=7), 1, 2),
        (lambda: resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], num_classes=7), 1, 2),
        (chain_of, 1, 2),
        (lambda: chain_of(nn.Upsample(scale_factor=2)), 2, 4),
    ],
    ids=["basic", "bottleneck", "chain", "a module that is called as it is"],
)
def test_what_only_the_plan_sees_is_one_call(build: Callable[[], nn.Module], recordings: int, alone: int) -> None:
    model, x = make(build), torch.randn(2, 3, 32, 32)
    fusedres.optimize(model, x)
    with torch.no_grad():
        expected = model(x)
        with profile() as profiled:
            y = model(x)
    names = Counter(event.name.removeprefix("fusedres_native::") for event in profiled.events() or [])
    assert names["replay"] == recordings
    assert sum(names[name] for name in ("conv_act", "conv_act_", "conv_act_out", "max_pool_out", "mean_out")) == alone
    assert torch.equal(y, expected)

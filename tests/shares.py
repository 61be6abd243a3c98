"""What each process of a group checks: with its share of a batch it gets what one process with all of it would.

python shares.py CHECKS RANK FOLDER SHARES BACKEND    as tests/test_synchronised.py starts them, one for each share
"""

import copy
import math
import sys
from contextlib import nullcontext
from functools import partial
from statistics import median
from unittest.mock import patch

import pytest
import python_backend
import torch
from eager import randomise
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import fusedres
from fusedres import executor
from fusedres.epilogue import IDENTITY
from fusedres.residual import Residual, Stage, run


class Scaled(nn.Module):
    """A block whose branch is multiplied by a gate."""

    residual = Residual((Stage("conv1", "bn1", "relu"), Stage("conv2", "bn2")), shortcut=(), gate="scale", act="relu")

    def __init__(self, channels, norm_layer):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.bn1, self.bn2 = norm_layer(channels), norm_layer(channels)
        self.relu, self.scale = nn.ReLU(), nn.Parameter(torch.linspace(-1, 1, channels))

    def forward(self, x):
        return run(self, self.residual, x, self._no_eager_path)

    def _no_eager_path(self, x):
        raise AssertionError("the eager path")


def network(norm_layer):
    basic, bottleneck = (partial(block, norm_layer=norm_layer) for block in (fusedres.BasicBlock, fusedres.Bottleneck))
    return nn.Sequential(basic(4, 4), basic(4, 8, 2), bottleneck(8, 2), bottleneck(8, 2, 2), Scaled(8, norm_layer))


def plain(model):
    """Nothing to be changed."""


def smooth(model):
    """The shortcut's norm can't share the branch's call."""
    model[1].relu = nn.SiLU()


def frozen_projection(model):
    """One of two norms at a block's end takes its own statistics."""
    model[1].shortcut[1].eval()


class Group:
    """This process among the others.

    Args:
        counts: how many of the batch's images each process has.
    """

    def __init__(self, rank, folder, counts):
        store = f"file://{folder}/store"
        distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=len(counts))
        begin = sum(counts[:rank])
        self.size, self.total = len(counts), sum(counts)
        self.mine = slice(begin, begin + counts[rank])
        self.is_empty = not counts[rank]

    def networks(self, momentum=0.1, change=plain, dtype=torch.float64):
        """With batch norms, and with synchronised ones."""
        whole = network(lambda c: nn.BatchNorm2d(c, momentum=momentum)).to(dtype)
        randomise(whole)
        change(whole)
        shared = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(whole))
        for block, twin in zip(whole.modules(), shared.modules(), strict=True):
            twin.training = block.training
        assert isinstance(shared[0].bn1, nn.SyncBatchNorm)
        return whole, shared

    def batch(self, dtype=torch.float64, layout=torch.channels_last):
        x = 3 + 2 * torch.randn(self.total, 4, 8, 8, dtype=dtype)
        return x.to(memory_format=layout), torch.randn(self.total, 8, 2, 2, dtype=dtype)


def step(model, x, weights):
    """Two forwards before a backward: outputs, gradients and buffers by name."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    model.zero_grad()
    first, second = model(x), model(0.5 * x + 1)
    (first * weights + second * weights.square()).sum().backward()
    gradients = {f"d {name}": parameter.grad for name, parameter in model.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return {"y": torch.stack([first, second]).detach(), "dx": x.grad}, gradients, buffers


def segments(model, x):
    """Which blocks are one function."""
    found = []
    for block in model:
        x = block(x)
        found.append(type(x.grad_fn).__name__ == "SyncSegmentFunctionBackward")
    return found


def assert_same(name, actual, expected):
    bar = 1e-11 * max(1.0, expected.abs().max().item()) if expected.numel() else 0
    torch.testing.assert_close(actual, expected, rtol=0, atol=bar, msg=lambda m: f"{name}: {m}")


def equal_one_process(group):
    """In fp64, whatever the layout, the memory policy and what a block is made of."""
    cases = [
        (0.1, torch.channels_last, "fast", plain, {0, 1, 2, 3}),
        (0.1, torch.contiguous_format, "lean", plain, {0, 1, 2, 3}),
        (0.1, torch.channels_last, "min", plain, {0, 1, 2, 3}),
        (None, torch.channels_last, "fast", plain, set()),
        (0.1, torch.channels_last, "fast", smooth, {0, 2, 3}),
        (0.1, torch.contiguous_format, "fast", frozen_projection, {0, 2, 3}),
    ]
    for momentum, layout, policy, change, functions in cases:
        whole, shared = group.networks(momentum, change)
        x, weights = group.batch(layout=layout)
        mine, weights_of_mine = x[group.mine], weights[group.mine]
        found = segments(copy.deepcopy(shared), mine)
        assert found == [index in functions and not group.is_empty for index in range(len(shared))], found
        with fusedres.use_backend("reference"):
            expected, gradients, buffers = step(whole, x, weights)
        with fusedres.set_memory(policy):
            ours, our_gradients, our_buffers = step(shared, mine, weights_of_mine)
        assert_same("y", ours["y"], expected["y"][:, group.mine])
        assert_same("dx", ours["dx"], expected["dx"][group.mine])
        for name, gradient in gradients.items():
            distributed.all_reduce(our_gradients[name])
            assert_same(name, our_gradients[name], gradient)
        for name, buffer in buffers.items():
            assert_same(name, our_buffers[name], buffer)


def are_as_accurate_as_one_process(group):
    """In bfloat16: as near to fp64 as eager with the whole batch, and the same bits under every memory policy."""
    ratios = []
    for seed in range(6):
        torch.manual_seed(seed)
        whole, shared = group.networks(dtype=torch.float32)
        x, weights = group.batch(torch.bfloat16)
        with fusedres.use_backend("reference"):
            truth = step(copy.deepcopy(whole).double(), x.double(), weights.double())
        found = []
        for policy in ("fast", "lean", "min"):
            with fusedres.set_memory(policy), torch.autocast("cpu", torch.bfloat16):
                found.append(step(copy.deepcopy(shared), x[group.mine], weights[group.mine]))
        for others in found[1:]:
            for tensors, expected in zip(others, found[0], strict=True):
                for name, t in tensors.items():
                    assert torch.equal(t, expected[name]), name
        with fusedres.use_backend("reference"), torch.autocast("cpu", torch.bfloat16):
            eager = step(whole, x, weights)
        ours = together(group, found[0])
        for tensors, eagers, true in zip(ours, eager, truth, strict=True):
            for name, t in true.items():
                if t.is_floating_point():
                    ratios.append(math.log(error(tensors[name], t) / error(eagers[name], t)))
    times = math.exp(median(ratios))
    assert times <= 1.1, f"errors are {times:.2f} times those of eager with the whole batch"


def together(group, found):
    """Every share's outputs side by side, and the gradients' sums."""
    outputs, gradients, buffers = found
    shares = [None] * group.size
    distributed.all_gather_object(shares, outputs)
    joined = {"y": torch.cat([share["y"] for share in shares], 1), "dx": torch.cat([share["dx"] for share in shares])}
    sums = {name: gradient.double() for name, gradient in gradients.items()}
    for gradient in sums.values():
        distributed.all_reduce(gradient)
    return joined, sums, buffers


def error(actual, truth):
    return max(((actual.double() - truth).norm() / truth.norm()).item(), 2**-12)


def know_means_beyond_their_precision(group):
    """In float32, where values are far from zero beside their deviation; each image has a mean of its own."""
    shape = group.total, 4, 8, 8
    x = 1e5 + torch.arange(group.total).view(-1, 1, 1, 1) + torch.randn(shape)
    weights, whole = torch.randn(shape), nn.BatchNorm2d(4)
    exact = copy.deepcopy(whole).double()
    shared = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(whole))
    found = []
    for norm, dtype, share in ((exact, torch.float64, slice(None)), (shared, torch.float32, group.mine)):
        given = x[share].to(dtype).requires_grad_()
        y = executor.bn_act(given, norm, IDENTITY)
        (y * weights[share]).sum().backward()
        found.append((y.detach()[group.mine if norm is exact else slice(None)], given.grad))
    (y, dx), (our_y, our_dx) = found
    for actual, expected in ((our_y, y), (our_dx, dx[group.mine])):
        assert (actual - expected).norm() <= 1e-6 * expected.norm()


def accumulate_without_synchronising_gradients(group):
    """DistributedDataParallel: gradients of two batches, the first under no_sync, averaged over the processes."""
    whole, _ = group.networks()
    wrapped = DistributedDataParallel(copy.deepcopy(whole))
    shared = nn.SyncBatchNorm.convert_sync_batchnorm(wrapped.module)  # refused on CPUs before it is wrapped
    batches = [group.batch() for _ in range(2)]
    with fusedres.use_backend("reference"):
        for x, weights in batches:
            (whole(x) * weights).sum().backward()
    for (x, weights), context in zip(batches, (wrapped.no_sync(), nullcontext()), strict=True):
        with context:
            (wrapped(x[group.mine]) * weights[group.mine]).sum().backward()
    for (name, expected), parameter in zip(whole.named_parameters(), shared.parameters(), strict=True):
        assert_same(name, group.size * parameter.grad, expected.grad)
    for (name, expected), buffer in zip(whole.named_buffers(), shared.buffers(), strict=True):
        assert_same(name, buffer, expected)


def exchange_once_each_way(group):
    """For every call of a norm, or of a block's last and its projection's together, whatever the memory policy."""
    _, shared = group.networks()
    x, _ = group.batch()
    x = x[group.mine]
    for block, calls in zip(shared, (2, 2, 3, 3, 2), strict=True):
        for policy in ("fast", "lean", "min"):
            with (
                patch.object(distributed, "all_gather", wraps=distributed.all_gather) as gathers,
                patch.object(distributed, "all_reduce", wraps=distributed.all_reduce) as sums,
                fusedres.set_memory(policy),
            ):
                y = block(x.requires_grad_())
                assert (gathers.call_count, sums.call_count) == (calls, 0)
                y.square().sum().backward()
                assert (gathers.call_count, sums.call_count) == (calls, calls)
            values = [call.args[1].numel() for call in gathers.call_args_list]
            values += [call.args[0].numel() for call in sums.call_args_list]
            assert max(values) <= 2 * (2 * y.shape[1] + 1)
        x = y.detach()


def refuse_second_derivatives(group):
    """An error, where the statistics of one share alone would give a wrong number."""
    _, shared = group.networks()
    for block, channels in ((nn.Sequential(*shared[:4]), 4), (shared[4], 8)):
        x = torch.randn(2, channels, 8, 8, dtype=torch.float64, requires_grad=True)
        (dx,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            dx.sum().backward()


if __name__ == "__main__":
    checks, rank, folder, counts, backend = sys.argv[1:]
    torch.set_num_threads(1)
    torch.manual_seed(3)
    if backend == "python":
        fusedres.ops.register_backend(python_backend.BACKEND)
    group = Group(int(rank), folder, list(map(int, counts.split(","))))
    for check in checks.split(","):
        globals()[check](group)
    distributed.destroy_process_group()
    sys.stdout.write("passed")

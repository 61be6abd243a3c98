"""What a training loop does to a block: mixed precision, activation checkpointing, data parallel."""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from eager import (
    assert_as_accurate_as_eager,
    assert_matches_eager,
    assert_same,
    identity_pair,
    observe,
    pair,
    projection_pair,
    sample,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import fusedres
from fusedres.testing import import_torchvision

FrozenBatchNorm2d = import_torchvision().ops.FrozenBatchNorm2d


@pytest.fixture
def autocast(device):
    return partial(torch.autocast, device, dtype=torch.bfloat16)


def fp32_pair(*arguments, training=True, **kwargs):
    return [block.train(training) for block in pair(*arguments, dtype=torch.float32, **kwargs)]


BLOCKS = {
    "identity": ("BasicBlock", 4, 4),
    "projection": ("BasicBlock", 4, 6, 2),
    "bottleneck": ("Bottleneck", 4, 2),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", BLOCKS)
def test_autocast_gives_eagers_dtypes_and_accuracy(block, given, training, autocast, backend):
    assert_as_accurate_as_eager(
        lambda: fp32_pair(*BLOCKS[block], training=training),
        lambda: sample(4, 4, 8, 8, dtype=given),
        context=autocast,
    )


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", BLOCKS)
def test_under_autocast_weight_gradients_are_in_the_parameters_dtype(block, given, autocast, backend):
    fused, _ = fp32_pair(*BLOCKS[block])
    x = sample(dtype=given).requires_grad_()
    with autocast():
        y = fused(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == given
    assert {parameter.grad.dtype for parameter in fused.parameters()} == {torch.float32}
    assert {norm.running_var.dtype for norm in fused.modules() if hasattr(norm, "running_var")} == {torch.float32}


@pytest.mark.parametrize("block", BLOCKS)
def test_frozen_norms_under_autocast_give_eagers_dtype(block, autocast, backend):
    fused, eager = fp32_pair(*BLOCKS[block], norm_layer=FrozenBatchNorm2d)
    actual = observe(fused, sample(dtype=torch.float32), context=autocast)
    expected = observe(eager, sample(dtype=torch.float32), context=autocast)
    assert {name: t.dtype for name, t in actual.tensors.items()} == {
        name: t.dtype for name, t in expected.tensors.items()
    }


@pytest.mark.parametrize("block", BLOCKS)
def test_frozen_norms_under_autocast_give_eagers_values(block, autocast, kernels):
    fused, eager = fp32_pair(*BLOCKS[block], norm_layer=FrozenBatchNorm2d)
    x = sample(dtype=torch.float32)
    actual, expected = observe(fused, x, context=autocast), observe(eager, x, context=autocast)
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(actual.tensors[name], tensor, rtol=1e-5, atol=1e-5)


def test_grad_scaler_steps_as_with_eager(device, backend):
    results = []
    for block in pair("BasicBlock", 4, 6, 2):
        torch.manual_seed(0)
        optimizer = torch.optim.SGD(block.parameters(), lr=0.1, momentum=0.9)
        scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
        for step in range(3):
            x = sample()
            if step == 1:
                x[0, 0, 0, 0] = float("inf")
            optimizer.zero_grad()
            scaler.scale(block(x).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 2.0**9
        results.append(block.conv1.weight.detach())
    assert results[0].isfinite().all()
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-11)


def test_grad_scaler_skips_steps_whose_half_gradients_overflow_as_with_eager(device, backend):
    scales = []
    for block in fp32_pair("BasicBlock", 4, 6, 2):
        torch.manual_seed(0)
        optimizer = torch.optim.SGD(block.parameters(), lr=1e-3)
        scaler = torch.amp.GradScaler(device, init_scale=2.0**20)
        found = []
        for _ in range(10):
            optimizer.zero_grad()
            with torch.autocast(device, torch.float16):
                y = block(sample(dtype=torch.float32))
            scaler.scale(y.float().square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            found.append(scaler.get_scale())
        scales.append(found)
        assert all(parameter.isfinite().all() for parameter in block.parameters())
    assert scales[0] == scales[1]
    skipped, (before, last) = scales[0][0] < 2.0**20, scales[0][-2:]
    assert skipped and before == last, "some steps are skipped, and some are not"


@pytest.mark.parametrize("policy", ["fast", "lean", "min"])
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("block", ["projection", "bottleneck"])
def test_activation_checkpointing_gives_eagers_gradients_and_statistics(block, use_reentrant, policy, backend):
    fused, eager = pair(*BLOCKS[block])
    run = partial(checkpoint, use_reentrant=use_reentrant)
    with fusedres.set_memory(policy):
        assert_matches_eager(Checkpointed(fused, run), Checkpointed(eager, run), sample())
    assert fused.bn1.num_batches_tracked == 2


@pytest.mark.parametrize("policy", ["lean", "min"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_under_autocast_is_as_accurate_as_eager(use_reentrant, policy, autocast, backend):
    run = partial(checkpoint, use_reentrant=use_reentrant)
    with fusedres.set_memory(policy):
        assert_as_accurate_as_eager(
            lambda: tuple(Checkpointed(block, run) for block in fp32_pair(*BLOCKS["bottleneck"])),
            lambda: sample(4, 4, 8, 8, dtype=torch.float32),
            context=autocast,
        )


class Checkpointed(nn.Module):
    def __init__(self, block, run):
        super().__init__()
        self.block, self.run = block, run

    def forward(self, x):
        return self.run(self.block, x)


@pytest.mark.parametrize("policy", ["fast", "lean", "min"])
@pytest.mark.parametrize("block", BLOCKS)
def test_under_autocast_a_retained_graph_gives_the_same_bits_again(block, policy, autocast, kernel_backend):
    fused, _ = fp32_pair(*BLOCKS[block])
    leaves = [sample(dtype=torch.float32).requires_grad_(), *fused.parameters()]
    with fusedres.set_memory(policy), autocast():
        y = fused(leaves[0])
    dy = torch.randn_like(y)
    first, second, last = (torch.autograd.grad(y, leaves, dy, retain_graph=kept) for kept in (True, True, False))
    for index, expected in enumerate(first):
        assert torch.equal(second[index], expected) and torch.equal(last[index], expected), index


@pytest.mark.parametrize("build", [identity_pair, projection_pair])
def test_a_training_run_follows_eagers(build, backend):
    weights = []
    for block in build():
        torch.manual_seed(0)
        optimizer = torch.optim.AdamW(block.parameters(), lr=1e-2)
        for _ in range(5):
            optimizer.zero_grad()
            block(sample()).square().mean().backward()
            optimizer.step()
        weights.append({name: t.detach() for name, t in block.state_dict().items()})
    for name, expected in weights[1].items():
        if backend == "reference":
            assert_same(name, weights[0][name], expected, exact=True)
        else:
            torch.testing.assert_close(weights[0][name], expected, rtol=1e-7, atol=1e-7)


def test_a_chain_of_blocks_accumulates_gradients_over_micro_batches(backend):
    found = []
    for first, second in zip(identity_pair(), identity_pair(), strict=True):
        chain = nn.Sequential(first, second)
        torch.manual_seed(0)
        for _ in range(3):
            chain(sample()).square().sum().backward()
        found.append({name: t.grad for name, t in chain.named_parameters()})
    for name, expected in found[1].items():
        torch.testing.assert_close(found[0][name], expected, rtol=1e-9, atol=1e-9)


DATA_PARALLEL = """
import os, sys
import fusedres, python_backend, torch
from eager import projection_pair, sample
from torch import distributed, nn

rank, folder, kernels = int(os.environ["RANK"]), os.environ["FOLDER"], os.environ["KERNELS"]
torch.set_num_threads(1)
distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
if kernels == "python":
    fusedres.ops.register_backend(python_backend.BACKEND)
found = []
torch.manual_seed(0)
for block in projection_pair():
    parallel = nn.parallel.DistributedDataParallel(block)
    torch.manual_seed(rank)
    with parallel.no_sync():
        parallel(sample()).square().sum().backward()
    parallel(sample()).square().sum().backward()
    # Two forwards before a backward: without broadcasts between them, which eager's own norm refuses.
    parallel.broadcast_buffers = False
    sum(parallel(sample()).square().sum() for _ in range(2)).backward()
    found.append({name: t.grad for name, t in block.named_parameters()} | dict(block.named_buffers()))
for name, expected in found[1].items():
    torch.testing.assert_close(found[0][name], expected, rtol=1e-10, atol=1e-10)
gathered = [torch.empty_like(found[0]["conv1.weight"]) for _ in range(2)]
distributed.all_gather(gathered, found[0]["conv1.weight"])
assert torch.equal(*gathered)
distributed.barrier()
sys.stdout.flush()
os._exit(0)  # tearing the reducer down after its process group can wait for ever
"""


@pytest.mark.skipif(os.name == "nt", reason="gloo's meeting over a file is tried on Linux and macOS")
@pytest.mark.parametrize("kernels", ["reference", "python", "native"])
def test_distributed_data_parallel_has_eagers_gradients_and_statistics(kernels, run_python, tmp_path, request):
    if kernels == "native":
        request.getfixturevalue("native")

    def rank(index):
        served = {} if kernels == "python" else {"FUSEDRES_BACKEND": kernels}
        return run_python(DATA_PARALLEL, RANK=str(index), FOLDER=str(tmp_path), KERNELS=kernels, **served)

    with ThreadPoolExecutor(2) as pool:
        assert [done.returncode for done in pool.map(rank, range(2))] == [0, 0]

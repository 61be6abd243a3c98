"""Blocks that train on the compiled convolutions: accuracy, memory policies, and where aten's are kept."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision_models import resnet
from training_steps import ATEN, Operations, block_and_input, channels_last, relative_error, step

import fusedres
from fusedres import dispatch

pytestmark = pytest.mark.usefixtures("native")

BUILDS = {"basic": ("BasicBlock", 32, 32), "projection": ("BasicBlock", 32, 40), "bottleneck": ("Bottleneck", 64, 32)}
WEIGHTS = {"basic": 2, "projection": 3, "bottleneck": 4}


@pytest.mark.parametrize("build", BUILDS)
def test_a_block_trains_on_them_as_accurately_as_winograds_form_allows(build):
    fused, eager, x = block_and_input(*BUILDS[build])
    found, count = step(fused, x)
    convolutions = 1 if build == "bottleneck" else 2
    assert count["conv_dweight"] == WEIGHTS[build]
    assert count["conv"] + count["conv_"] == 2 * convolutions
    assert count["conv_"] == (build != "bottleneck"), "dx added to the shortcut's gradient in one pass"
    exact, _ = step(copy.deepcopy(eager).double(), x.double())
    plain, none = step(eager, x)
    assert set(none.values()) == {0}
    for name, expected in exact.items():
        assert relative_error(found[name], expected) <= 4 * relative_error(plain[name], expected), name
        assert found[name].stride() == plain[name].stride(), name


@pytest.mark.parametrize("frozen", ["weights", "norms", "x", "first"])
def test_gradients_that_nobody_wants_are_not_computed(frozen):
    fused, _, x = block_and_input()
    twin = copy.deepcopy(fused)
    fused.conv1.weight.requires_grad_(frozen not in ("weights", "first"))
    fused.conv2.weight.requires_grad_(frozen != "weights")
    for norm in (fused.bn1, fused.bn2):
        norm.requires_grad_(frozen != "norms")
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_(frozen != "x")
    with Operations() as operations:
        fused(leaf).square().sum().backward()
    count = operations.kernels
    assert count["conv_dweight"] == {"weights": 0, "first": 1}.get(frozen, 2)
    assert count["conv"] + count["conv_"] == (3 if frozen == "x" else 4)
    everything = x.clone(memory_format=torch.preserve_format).requires_grad_()
    twin(everything).square().sum().backward()
    pairs = zip((leaf, *fused.parameters()), (everything, *twin.parameters()), strict=True)
    for wanted, same in pairs:
        assert torch.equal(wanted.grad, same.grad) if wanted.requires_grad else wanted.grad is None


@pytest.mark.parametrize("build", BUILDS)
def test_every_memory_policy_gives_the_same_bits(build):
    fused, _, x = block_and_input(*BUILDS[build])
    results = []
    for policy in ("fast", "lean", "min"):
        with fusedres.set_memory(policy):
            results.append(step(copy.deepcopy(fused), x)[0])
    for other in results[1:]:
        for name, expected in results[0].items():
            assert torch.equal(other[name], expected), name


def test_a_weight_that_changed_is_packed_again():
    fused, _, x = block_and_input()
    before, _ = step(fused, x)
    with torch.no_grad():
        fused.conv1.weight.mul_(-1)
        fused.conv2.weight.data[:] = 0
    after, _ = step(fused, x)
    fresh, _ = step(copy.deepcopy(fused), x)
    assert not torch.equal(after["y"], before["y"])
    for name, expected in fresh.items():
        assert torch.equal(after[name], expected), name


def test_double_backward_is_atens_formula():
    fused, eager, x = block_and_input()
    results = []
    for block in (fused, eager.double()):
        leaf = x.to(block.conv1.weight.dtype).requires_grad_()
        (dx,) = torch.autograd.grad(block(leaf).square().sum(), leaf, create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum(), [leaf, *block.parameters()]))
    for found, expected in zip(*results, strict=True):
        assert relative_error(found, expected) <= 1e-5


@pytest.mark.parametrize("case", ["contiguous", "float16", "double", "switched off"])
def test_elsewhere_convolutions_are_atens_but_for_weights_in_channels_last(case, monkeypatch):
    fused, _, x = block_and_input(layout=torch.contiguous_format if case == "contiguous" else torch.channels_last)
    if case == "contiguous":
        fused.to(memory_format=torch.contiguous_format)
    if case == "double":
        fused, x = fused.double(), x.double()
    if case == "switched off":
        monkeypatch.setenv("FUSEDRES_WINOGRAD", "0")
        dispatch.clear()
    with torch.autocast("cpu", torch.float16, enabled=case == "float16"):
        _, count = step(fused, x)
    dispatch.clear()
    assert count == ATEN | {"conv_dweight": 2 if case == "switched off" else 0}


def float32_body():
    """Its stem's convolution, 1x1 and strided ones would be aten's, whose sums depend on the threads."""
    return nn.Sequential(*[resnet.BasicBlock(32, 32) for _ in range(3)])


def bfloat16_body():
    def projection(inputs, outputs):
        return nn.Sequential(nn.Conv2d(inputs, outputs, 1, 2, bias=False), nn.BatchNorm2d(outputs))

    stem = nn.Conv2d(3, 40, 3, padding=1, bias=False), nn.BatchNorm2d(40), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    blocks = (
        resnet.BasicBlock(40, 40),
        resnet.BasicBlock(40, 64, 2, projection(40, 64)),
        resnet.Bottleneck(64, 8, 2, projection(64, 32)),
    )
    return nn.Sequential(*stem, *blocks)


@pytest.mark.parametrize(
    "build, sizes, dtype",
    [(float32_body, (8, 32, 32, 32), torch.float32), (bfloat16_body, (8, 3, 64, 64), torch.bfloat16)],
    ids=["float32", "autocast"],
)
def test_a_training_step_of_a_network_is_the_same_bits_whatever_the_threads(build, sizes, dtype):
    model = nn.Sequential(build(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    fusedres.fuse(model.to(memory_format=torch.channels_last))
    x, results, threads = channels_last(torch.randn(sizes)), [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            twin = copy.deepcopy(model)
            with Operations() as operations:
                with torch.autocast("cpu", enabled=dtype is torch.bfloat16):
                    loss = F.cross_entropy(twin(x), torch.arange(8))
                loss.backward()
            assert not operations.count["convolution"] and not operations.gradients
            gradients = {f"d {name}": p.grad for name, p in twin.named_parameters()}
            results.append({"loss": loss.detach()} | gradients | dict(twin.named_buffers()))
    finally:
        torch.set_num_threads(threads)
    for count, found in enumerate(results[1:], 2):
        different = [name for name, expected in results[0].items() if not torch.equal(found[name], expected)]
        assert not different, f"with {count} threads: {different}"

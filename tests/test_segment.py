"""A block as one autograd function: when it is one, what it computes, and what it leaves out."""

import copy
from functools import partial

import pytest
import torch
from eager import assert_as_accurate_as_eager, assert_matches_eager, assert_same_error, randomise, sample
from segments import BUILDS, LAYOUTS, input_of, is_segment
from torch import nn
from training_steps import Operations

from fusedres.backends import reference
from fusedres.residual import Residual, Stage, run

# When


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("build", BUILDS)
def test_a_block_is_one_function(build, training, kernel_backend):
    fused, eager = BUILDS[build]()
    for layout in LAYOUTS:
        x = input_of(fused, layout=layout)
        assert is_segment(copy.deepcopy(fused).train(training)(x))
        assert_matches_eager(fused.train(training), eager.train(training), x)


def test_under_autocast_it_is_as_accurate_as_eager(kernel_backend):
    for build in ("basic, projection", "bottleneck, identity"):
        half = partial(torch.autocast, "cpu", torch.bfloat16)
        builder = partial(BUILDS[build], dtype=torch.float32)
        block, _ = builder()
        with half():
            assert is_segment(block(input_of(block, torch.bfloat16)))
        assert_as_accurate_as_eager(builder, lambda block=block: input_of(block, torch.bfloat16), context=half)


def test_what_autocast_made_possible_is_still_an_error_without_it(kernel_backend):
    fused, eager = BUILDS["basic, projection"](dtype=torch.float32)
    x = input_of(fused, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert is_segment(fused(x))
    assert_same_error(fused, eager, x)


def hooked(block):
    block.conv2.register_forward_hook(lambda *_: None)


def padded_otherwise(block):
    block.conv1.padding_mode = "circular"


def padded_by_name(block):
    block.conv1.padding = "same"


def averaged(block):
    block.bn1.momentum = None


def weight_in_another_layout(block):
    block.conv1.weight.data = block.conv1.weight.data.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("change", [hooked, padded_otherwise, padded_by_name, averaged, weight_in_another_layout])
def test_what_the_function_can_not_compute_runs_op_by_op(change, kernel_backend):
    for build in ("basic, identity", "basic, projection"):
        fused, eager = BUILDS[build]()
        if build == "basic, projection" and change is padded_by_name:
            continue  # not with strides
        for block in (fused, eager):
            change(block)
        x = input_of(fused, layout="contiguous")
        assert not is_segment(fused(x))
        fused.load_state_dict(eager.state_dict())
        assert_matches_eager(fused, eager, x)


def test_a_chain_up_to_an_attention_is_one_function(kernels):
    class Attended(nn.Module):
        residual = Residual(
            (Stage("conv1", "bn1", "act"), Stage("conv2", "bn2", "act"), Stage("conv3", "bn3")),
            shortcut="downsample",
            between=("attention",),
            act="act",
            adds_in_place=False,
        )

        def __init__(self):
            super().__init__()
            for i in (1, 2, 3):
                setattr(self, f"conv{i}", nn.Conv2d(4, 4, 3, padding=1))
                setattr(self, f"bn{i}", nn.BatchNorm2d(4))
            self.attention, self.act, self.downsample = nn.Softmax2d(), nn.ReLU(inplace=True), None

        def eager_forward(self, x):
            out = self.act(self.bn2(self.conv2(self.act(self.bn1(self.conv1(x))))))
            return self.act(self.attention(self.bn3(self.conv3(out))) + x)

        def forward(self, x):
            return run(self, self.residual, x, self.eager_forward)

    fused = Attended()
    randomise(fused)
    fused.double()
    eager = copy.deepcopy(fused)
    eager.__class__ = type("Eager", (Attended,), {"forward": Attended.eager_forward})
    x = sample(3, 4, 6, 6)
    assert_matches_eager(fused, eager, x)
    y = fused(x)  # a node lives no longer than its tensor
    nodes, found = [y.grad_fn], []
    while nodes:
        node = nodes.pop()
        found.append(type(node).__name__)
        nodes += [following for following, _ in node.next_functions if following is not None]
    assert found.count("SegmentFunctionBackward") == 1


# What it leaves out


@pytest.mark.parametrize("build", BUILDS)
def test_gradients_nobody_asked_for_are_not_computed(build, kernel_backend):
    fused, eager = BUILDS[build]()
    names = [name for name, _ in fused.named_parameters()]
    for wanted in (["x"], names, ["x", *names], *[[name] for name in names], ["x", names[-1]]):
        found, work, given = [], [], input_of(fused)
        for block in (fused, eager):
            x = given.clone(memory_format=torch.preserve_format).requires_grad_("x" in wanted)
            for name, parameter in block.named_parameters():
                parameter.grad = None
                parameter.requires_grad_(name in wanted)
            y = block(x)
            with Operations() as operations:
                y.backward(given.sum() * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y).sin())
            found.append({"x": x.grad} | {name: parameter.grad for name, parameter in block.named_parameters()})
            work.append([sum(mask[i] for mask in operations.gradients) for i in range(3)])
        actual, expected = found
        for name, gradient in expected.items():
            assert (actual[name] is None) == (gradient is None), name
            if gradient is not None:
                torch.testing.assert_close(actual[name], gradient, rtol=0, atol=1e-12 * max(1, gradient.abs().max()))
        assert all(ours <= eagers for ours, eagers in zip(*work, strict=True)), f"{wanted}: {work}"


def test_the_shortcuts_gradient_is_added_in_place_or_by_the_convolution(kernel_backend):
    for build, operation in (("bottleneck, identity", "addmm_"), ("basic, identity", "add_")):
        fused, _ = BUILDS[build](dtype=torch.float32)
        y = fused(input_of(fused, torch.float32).requires_grad_())
        with Operations() as operations:
            y.backward(torch.ones_like(y))
        assert operations.count[operation] == 1
        assert not operations.count["add"]


def test_a_strided_projections_gradient_is_added_to_the_pixels_that_it_saw(kernel_backend, monkeypatch):
    spread, added = reference.spread_, []
    monkeypatch.setattr(reference, "spread_", lambda *given: added.append(given[:2]) or spread(*given))
    block, _ = BUILDS["bottleneck, projection"](dtype=torch.float32)
    x = input_of(block, torch.float32)
    for frozen in (False, True):
        block.shortcut.requires_grad_(not frozen)
        block.zero_grad()
        y = block(x.detach().requires_grad_())
        added.clear()
        with Operations() as operations:
            y.backward(torch.ones_like(y))
        ((into, product),) = added
        assert into.shape == x.shape and product.shape == (*x.shape[:2], *y.shape[2:])
        assert operations.count["add_"] == 1 and not operations.count["add"]


def test_weight_gradients_come_back_in_the_parameters_dtype(kernel_backend):
    fused, _ = BUILDS["bottleneck, projection"]()
    fused.float()
    with torch.autocast("cpu", torch.bfloat16):
        y = fused(input_of(fused, torch.float32))
    assert is_segment(y)
    assert y.dtype is torch.bfloat16
    y.sum().backward()
    assert {parameter.grad.dtype for parameter in fused.parameters()} == {torch.float32}

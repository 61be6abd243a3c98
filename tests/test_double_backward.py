"""Gradients of gradients through whole blocks."""

import pytest
import torch
from eager import assert_same, identity_pair, pair, projection_pair, sample
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call

import fusedres

BUILDS = {
    "identity": lambda: pair("BasicBlock", 2, 2),
    "projection": lambda: pair("BasicBlock", 2, 3, 2),
    "bottleneck": lambda: pair("Bottleneck", 2, 1, 2),
}


def subsets(block):
    """x and every parameter together, x alone, the parameters alone, and each of them alone."""
    names = [name for name, _ in block.named_parameters()]
    return [["x", *names], ["x"], names, *[[name] for name in names]]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("build", BUILDS)
def test_first_and_second_gradients_are_the_numerical_ones(build, training, backend):
    block, _ = BUILDS[build]()
    block.train(training)
    if training:
        for module in block.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.track_running_stats = False  # numerical differences call the block again and again
    values = {"x": sample(2, 2, 4, 4)} | {name: t.detach().clone() for name, t in block.named_parameters()}
    for subset in subsets(block):

        def function(*chosen, subset=subset):
            given = values | dict(zip(subset, chosen, strict=True))
            return functional_call(block, {name: t for name, t in given.items() if name != "x"}, (given["x"],))

        inputs = [values[name].clone().requires_grad_() for name in subset]
        block.requires_grad_(False)
        gradcheck(function, inputs, fast_mode=True)
        gradgradcheck(function, inputs, fast_mode=True, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("build", [identity_pair, projection_pair])
def test_a_gradient_penalty_has_eagers_gradients(build, training, backend):
    x = sample()
    found = []
    blocks = build()
    for block in blocks:
        block.train(training)
        given = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(block(given).square().sum(), given, create_graph=True)
        (dx.norm() - 1).square().backward()
        found.append({"x": given.grad} | {name: t.grad for name, t in block.named_parameters()})
    actual, expected = found
    for name, gradient in expected.items():
        assert_same(f"d {name}", actual[name], gradient, exact=backend == "reference")
    assert all(norm.num_batches_tracked == training for norm in blocks[0].modules() if isinstance(norm, nn.BatchNorm2d))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("build", ["projection", "bottleneck"])
def test_whatever_was_kept_every_second_gradient_is_eagers(build, training, backend):
    """Of x and every parameter, in one walk with what the output itself gives them."""
    x, blocks = sample(3, 2, 6, 6), BUILDS[build]()

    def gradients(block, policy):
        block.train(training).zero_grad()
        leaves = {"x": x.clone().requires_grad_()} | dict(block.named_parameters())
        with fusedres.set_memory(policy):
            y = block(leaves["x"]).square().mean()
        first = torch.autograd.grad(y, leaves.values(), create_graph=True)
        (y + sum(gradient.square().sum() for gradient in first)).backward()
        return {name: t.grad.clone() for name, t in leaves.items()}

    fused, eager = blocks
    fast, expected = gradients(fused, "fast"), gradients(eager, "fast")
    for name, gradient in expected.items():
        assert_same(f"d {name}", fast[name], gradient, exact=backend == "reference")
    for policy in ("lean", "min"):
        for name, gradient in gradients(fused, policy).items():
            assert_same(f"d {name}", gradient, fast[name], exact=backend != "composed")


class SpelledOutBatchNorm2d(nn.BatchNorm2d):
    """aten's own takes its batch statistics for constants from the third order on."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
        weight, bias = self.weight.view(1, -1, 1, 1), self.bias.view(1, -1, 1, 1)
        return (x - mean) * (var + self.eps).rsqrt() * weight + bias


@pytest.mark.parametrize("training", [True, False])
def test_third_gradients_are_those_of_the_formula(training, kernels):
    x, found = sample(), []
    fused, eager = projection_pair()
    for norm in eager.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.__class__ = SpelledOutBatchNorm2d
    for block in (fused, eager):
        t = x.clone().requires_grad_()
        y = block.train(training)(t).square().sum()
        for _ in range(3):
            (gradient,) = torch.autograd.grad(y, t, create_graph=True)
            y = gradient.square().sum()
        found.append(gradient)
    torch.testing.assert_close(*found, rtol=0, atol=1e-11 * found[1].abs().max().item())


def test_a_graph_kept_for_a_second_backward_gives_the_same_gradients(backend):
    fused, _ = projection_pair()
    y = fused(sample().requires_grad_()).square().sum()
    y.backward(retain_graph=True)
    first = {name: t.grad.clone() for name, t in fused.named_parameters()}
    y.backward()
    assert all(torch.equal(t.grad, 2 * first[name]) for name, t in fused.named_parameters())

"""transformers' ResNet as a client: fused, verified, trained, saved and taken back like any other model."""

import copy

import hugging_face
import pytest
import torch
from eager import randomise
from torch import nn

import fusedres
from fusedres.swap import Fused


def pair(layer_type="bottleneck"):
    model = hugging_face.classifier(layer_type).double()
    randomise(model)
    return model, copy.deepcopy(model)


def images():
    return torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
def test_every_block_of_a_classifier_is_fused_and_given_back(layer_type):
    model, _ = pair(layer_type)
    classes = [type(module) for module in model.modules()]
    report = fusedres.fuse(model, strict=True)
    blocks = [f"resnet.encoder.stages.{stage}.layers.{block}" for stage in (0, 1) for block in (0, 1)]
    assert [row.path for row in report.rows] == ["resnet.embedder.embedder", *blocks]
    assert {row.family for row in report.fused} == {"transformers"} and len(report.fused) == 5
    fusedres.unfuse(model)
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
def test_a_classifier_trains_and_serves_as_unfused(layer_type, backend):
    model, eager = pair(layer_type)
    fusedres.fuse(model)
    torch.manual_seed(0)
    batches = [images() for _ in range(3)]
    losses = []
    for network in (model, eager):
        optimiser = torch.optim.SGD(network.parameters(), lr=0.01)
        for x, labels in batches:
            optimiser.zero_grad()
            found = network(pixel_values=x, labels=labels)
            found.loss.backward()
            optimiser.step()
        losses.append(found.loss.detach())
    torch.testing.assert_close(*losses, rtol=1e-9, atol=1e-9)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, eager.state_dict()[name], rtol=1e-7, atol=1e-9)
    x, _ = images()
    torch.testing.assert_close(model.eval()(x).logits, eager.eval()(x).logits, rtol=1e-7, atol=1e-9)


def test_a_classifier_is_verified():
    model, _ = pair()
    fusedres.fuse(model.float())
    verification = fusedres.verify(model, images()[0].float())
    assert verification.agrees, str(verification)


def test_a_saved_classifier_holds_the_original_classes(tmp_path):
    model, _ = pair()
    fusedres.fuse(model)
    assert isinstance(copy.deepcopy(model).resnet.encoder.stages[0].layers[0], Fused)
    model.eval()
    x, _ = images()
    model.save_pretrained(tmp_path / "pretrained")
    loaded = type(model).from_pretrained(tmp_path / "pretrained", dtype=torch.float64).eval()
    torch.testing.assert_close(loaded(x).logits, model(x).logits, rtol=1e-12, atol=1e-12)
    torch.save(model, tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert not any(isinstance(module, Fused) for module in whole.modules())
    torch.testing.assert_close(whole(x).logits, model(x).logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("change", ["hook on a layer", "layer replaced", "layer appended", "hook on the shortcut"])
def test_what_changes_in_a_layer_after_fuse_is_seen(change, kernels):
    block = hugging_face.layer("bottleneck projection").double()
    eager = copy.deepcopy(block)
    fusedres.fuse(block, strict=True)
    x, calls = torch.randn(2, 8, 6, 6, dtype=torch.float64), []
    block(x)
    eager(x)
    for network in (block, eager):
        if change == "hook on a layer":
            network.layer[1].register_forward_hook(lambda module, args, y: calls.append(y))
        elif change == "hook on the shortcut":
            network.shortcut.register_forward_hook(lambda module, args, y: y * 2)
        elif change == "layer replaced":
            network.layer[1] = nn.Conv2d(3, 3, 3, 2, 1).double().requires_grad_(False)
            nn.init.constant_(network.layer[1].weight, 0.1)
            nn.init.zeros_(network.layer[1].bias)
        else:
            network.layer.append(nn.Tanh())
    torch.testing.assert_close(block(x), eager(x))
    assert len(calls) == (2 if change == "hook on a layer" else 0)

"""verify tells a right fused model from a wrong one, and leaves the model as it was."""

import copy
import math

import pytest
import torch
from eager import randomise
from torch import nn
from torchvision_models import resnet
from user_blocks import Cifar, Gated

import fusedres
from fusedres import families
from fusedres.epilogue import find
from fusedres.residual import Residual, Stage


def fused_network():
    model = nn.Sequential(resnet.BasicBlock(4, 4), Cifar(4, 6, 2), Gated(6, 6))
    randomise(model)
    fusedres.fuse(model, strict=True)
    return model


def test_a_fused_model_agrees(backend):
    result = fusedres.verify(fused_network(), torch.randn(4, 4, 8, 8))
    assert result.agrees, str(result)
    compared = {(c.mode, c.quantity) for c in result.comparisons}
    assert len(compared) == len(result.comparisons) == 5
    assert all(0 < c.eager < 1e-3 for c in result.comparisons)
    lines = str(result).splitlines()
    assert len(lines) == 6 and all(line.endswith("agrees") for line in lines[1:])


RELU, IDENTITY = find("relu"), find("identity")
WRONG = {
    "activation": Residual((Stage("conv1", "bn1"), Stage("conv2", "bn2")), "shortcut", act=RELU),
    "no final activation": Residual((Stage("conv1", "bn1", RELU), Stage("conv2", "bn2")), "shortcut"),
    "no shortcut": Residual((Stage("conv1", "bn1", RELU), Stage("conv2", "bn2")), "", act=RELU),
    "norms exchanged": Residual((Stage("conv1", "bn2", RELU), Stage("conv2", "bn1")), "shortcut", act=RELU),
}


@pytest.mark.parametrize("description", WRONG.values(), ids=WRONG)
def test_a_wrong_description_differs(description):
    class Wrong(Cifar):
        pass

    fusedres.register_family(Wrong, "wrong")(lambda block: description)
    try:
        block = Wrong()
        if description is WRONG["no shortcut"]:
            block.shortcut = nn.Conv2d(4, 4, 1)
        randomise(block)
        fusedres.fuse(block, strict=True)
        result = fusedres.verify(block, torch.randn(4, 4, 8, 8))
    finally:
        families.FAMILIES.popitem()
    assert not result.agrees
    missing = [c.quantity for c in result.comparisons if c.fused == math.inf]
    assert missing == (["gradients"] * 2 if description is WRONG["no shortcut"] else [])
    assert "DIFFERS" in str(result)


def test_the_model_is_left_as_it_was():
    model = fused_network().eval()
    x = torch.randn(4, 4, 8, 8)
    model[0].conv1.weight.grad = torch.ones_like(model[0].conv1.weight)
    before = copy.deepcopy(model.state_dict())
    classes = [type(module) for module in model.modules()]
    random_state = torch.get_rng_state()
    fusedres.verify(model, x)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [type(module) for module in model.modules()] == classes and not model.training
    assert model[0].conv1.weight.grad.sum() == model[0].conv1.weight.numel() and not x.requires_grad


def test_several_outputs_are_compared():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Cifar()

        def forward(self, x):
            y = self.block(x)
            return {"y": y, "mean": (y.mean(), None)}

    model = Two()
    fusedres.fuse(model)
    assert fusedres.verify(model, torch.randn(2, 4, 8, 8)).agrees


def test_a_model_that_is_not_fused_is_refused():
    with pytest.raises(ValueError, match="call fuse first"):
        fusedres.verify(Cifar(), torch.randn(2, 4, 8, 8))

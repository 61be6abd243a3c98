"""Models small enough to compare and profile in a test, by the name `small_models:tiny`."""

import torch
from torch import nn
from torchvision_models import resnet

import fusedres


def tiny():
    """A stem and two residual blocks, one with a projection."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        resnet.BasicBlock(8, 8),
        resnet.BasicBlock(8, 16, 2, nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


def plain():
    """Nothing in it can be fused."""
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sigmoid())


def always_fused():
    """Its block has no eager form to compare with."""
    return nn.Sequential(fusedres.BasicBlock(3, 8))


class DropPath(nn.Module):
    """Leaves out some images' values, as timm's does."""

    def __init__(self):
        super().__init__()
        self.drop_prob = 0.5

    def forward(self, x):
        return x * (torch.rand(len(x), 1, device=x.device) >= self.drop_prob)


def random():
    """Two runs of it in training have little in common."""
    return nn.Sequential(tiny(), DropPath(), nn.Dropout(0.5), nn.Linear(10, 10))


def not_a_model():
    return 3

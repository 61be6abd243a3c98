"""Blocks as users write them: some are the formula, some only look like it."""

import torch
import torch.nn.functional as F
from torch import nn


class Convolutions(nn.Module):
    """conv1, bn1, conv2, bn2 and a shortcut; subclasses wire them."""

    def __init__(self, inplanes=4, planes=4, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride != 1 or inplanes != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def branch(self, x):
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))


class Cifar(Convolutions):
    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class Tutorial(Convolutions):
    """The projection first, an addition that promotes, one ReLU module for both places."""

    def __init__(self, inplanes=4, planes=4, stride=1):
        super().__init__(inplanes, planes, stride)
        self.downsample = self.shortcut if len(self.shortcut) else None
        del self.shortcut

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(identity + out)


class ConvNormAct(nn.Module):
    def __init__(self, inplanes, planes, stride=1, act=True):
        super().__init__()
        self.conv = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(planes)
        self.act = nn.SiLU() if act else None

    def forward(self, x):
        x = self.norm(self.conv(x))
        return x if self.act is None else self.act(x)


class Nested(nn.Module):
    """Helpers that hold the norms, and a projection of single children."""

    def __init__(self, inplanes=4, planes=4, stride=1):
        super().__init__()
        self.layers = nn.Sequential(ConvNormAct(inplanes, planes, stride), ConvNormAct(planes, planes, act=False))
        self.project = ConvNormAct(inplanes, planes, stride, act=False)

    def forward(self, x):
        return F.silu(self.layers(x) + self.project(x))


class Gated(Convolutions):
    """LayerScale, dropout between the convolutions, no activation at the end."""

    def __init__(self, inplanes=4, planes=4, stride=1):
        super().__init__(inplanes, planes, stride)
        self.gamma = nn.Parameter(torch.linspace(0.5, 1.5, planes).view(1, -1, 1, 1))
        self.dropout = nn.Dropout(0.2)

    def forward(self, x):
        out = self.dropout(self.relu(self.bn1(self.conv1(x))))
        return self.shortcut(x) + self.gamma * self.bn2(self.conv2(out))


class ReZero(Convolutions):
    def __init__(self, inplanes=4, planes=4, stride=1):
        super().__init__(inplanes, planes, stride)
        self.alpha = nn.Parameter(torch.tensor(0.3))

    def forward(self, x):
        return F.relu(torch.add(self.branch(x) * self.alpha, self.shortcut(x)))


class MmdetStyle(nn.Module):
    """Norms under dynamic names, reached through properties, and flags that choose the wiring."""

    def __init__(self, inplanes=4, planes=4, stride=1):
        super().__init__()
        self.norm1_name, self.norm2_name = "bn1", "bn2"
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.add_module(self.norm1_name, nn.BatchNorm2d(planes))
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.add_module(self.norm2_name, nn.BatchNorm2d(planes))
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inplanes != planes:
            self.downsample = nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))
        self.with_cp = False

    @property
    def norm1(self):
        return getattr(self, self.norm1_name)

    @property
    def norm2(self):
        return getattr(self, self.norm2_name)

    def forward(self, x):
        def inner(x):
            out = self.relu(self.norm1(self.conv1(x)))
            out = self.norm2(self.conv2(out))
            out += x if self.downsample is None else self.downsample(x)
            return out

        out = torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=False) if self.with_cp else inner(x)
        return self.relu(out)


PROVEN = (Cifar, Tutorial, Nested, Gated, ReZero, MmdetStyle)


class PreActivation(Convolutions):
    def forward(self, x):
        out = F.relu(self.bn1(x))
        return self.conv2(F.relu(self.bn2(self.conv1(out)))) + x


class Scaled(Convolutions):
    def forward(self, x):
        return F.relu(self.branch(x) * 0.1 + x)


class ActBeforeNorm(Convolutions):
    def forward(self, x):
        out = self.bn1(F.relu(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + x)


class AddsIntoInput(Convolutions):
    def forward(self, x):
        x += self.branch(x)
        return F.relu(x)


class AddsIntoShortcut(Convolutions):
    def forward(self, x):
        shortcut = self.conv2(x)
        shortcut += self.bn1(self.conv1(x))
        return F.relu(shortcut)


class MultipliesInPlace(Convolutions):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(1, 4, 1, 1))

    def forward(self, x):
        out = self.branch(x)
        out *= self.gamma
        return F.relu(out + x)


class WrongGate(Convolutions):
    """Along the width, not the channels."""

    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(6))

    def forward(self, x):
        return F.relu(self.branch(x) * self.gamma + x)


class ModeDependent(Convolutions):
    def forward(self, x):
        out = self.branch(x)
        return F.relu(out + x) if self.training else F.relu6(out + x)


class ValueDependent(Convolutions):
    def forward(self, x):
        return F.relu(self.branch(x) + x) if x.mean() > 0 else x


class Leaky(Convolutions):
    def forward(self, x):
        return F.leaky_relu(self.branch(x) + x, 0.3)


class AddsTwice(Convolutions):
    def forward(self, x):
        return F.relu(self.branch(x) + x + x)


class AddsScaled(Convolutions):
    def forward(self, x):
        return F.relu(torch.add(self.branch(x), x, alpha=2))


class ReturnsTwo(Convolutions):
    def forward(self, x):
        out = self.branch(x)
        return F.relu(out + x), out


class UsesTwice(Convolutions):
    def forward(self, x):
        out = self.branch(x)
        return F.relu(out + x) * out.mean()


class Discards(Convolutions):
    """The statistics of bn1 move twice."""

    def forward(self, x):
        self.bn1(self.conv1(x))
        return F.relu(self.branch(x) + x)


class RandomShortcutFirst(Convolutions):
    def __init__(self):
        super().__init__()
        self.drop, self.drop_branch = nn.Dropout(0.5), nn.Dropout(0.5)

    def forward(self, x):
        shortcut = self.drop(x)
        out = self.drop_branch(F.relu(self.bn1(self.conv1(x))))
        return F.relu(self.bn2(self.conv2(out)) + shortcut)


class InPlaceShortcutFirst(Convolutions):
    def forward(self, x):
        shortcut = self.relu(x)
        return F.relu(self.branch(x) + shortcut)


class ReadsSettings(Convolutions):
    def __init__(self):
        super().__init__()
        self.settings = {"act": True}

    def forward(self, x):
        out = self.branch(x) + x
        return F.relu(out) if self.settings["act"] else out


class AddsItself(Convolutions):
    def forward(self, x):
        out = self.branch(x)
        return F.relu(out + out)


class AddsDouble(Convolutions):
    def forward(self, x):
        return F.relu(self.branch(x) + (x + x))


class TwoNorms(Convolutions):
    def forward(self, x):
        return F.relu(self.bn2(self.bn1(self.conv1(x))) + x)


class InPlaceBranchAfterShortcut(Convolutions):
    def forward(self, x):
        shortcut = self.conv2(x)
        return F.relu(self.bn1(self.relu(x)) + shortcut)


UNPROVEN = (
    AddsItself,
    AddsDouble,
    TwoNorms,
    InPlaceBranchAfterShortcut,
    PreActivation,
    Scaled,
    ActBeforeNorm,
    AddsIntoInput,
    AddsIntoShortcut,
    MultipliesInPlace,
    WrongGate,
    ModeDependent,
    ValueDependent,
    Leaky,
    AddsTwice,
    AddsScaled,
    ReturnsTwo,
    UsesTwice,
    Discards,
    RandomShortcutFirst,
    InPlaceShortcutFirst,
    ReadsSettings,
)

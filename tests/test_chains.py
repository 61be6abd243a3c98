"""A network that calls its stem, its stages and its head one after the other has its stem fused."""

import copy

import optional
import pytest
import torch
import torch.nn.functional as F
from eager import assert_matches_eager, randomise
from torch import nn
from torchvision_models import resnet, torchvision
from user_blocks import Cifar

import fusedres
from fusedres.report import Code
from fusedres.swap import Fused

timm = optional.package("timm")


class Net(nn.Module):
    """A stem, a stage and a head; `tail` says how the head is reached."""

    def __init__(self, pool=True):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.act1 = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(Cifar(4, 4))
        self.fc = nn.Linear(4, 2)
        self.pool = pool

    def forward(self, x):
        x = self.layer1(self.act1(self.bn1(self.conv1(x))))
        if self.pool:
            x = F.adaptive_avg_pool2d(x, 1)
        return self.fc(x.flatten(1))


class Drops(Net):
    """A function that does another thing in training."""

    def forward(self, x):
        x = F.dropout(self.act1(self.bn1(self.conv1(x))), training=self.training)
        return self.layer1(x)


def pair(model):
    model = model.double()
    randomise(model)
    eager = copy.deepcopy(model)
    report = fusedres.fuse(model)
    assert isinstance(model, Fused), str(report)
    return model, eager


def images():
    return torch.randn(2, 3, 32, 32, dtype=torch.float64)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize(
    "build",
    [
        Net,
        Drops,
        lambda: resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=3),
        lambda: timm.create_model("resnet10t", num_classes=3),
        lambda: timm.create_model("resnet18", num_classes=3, drop_rate=0.2),
    ],
    ids=["own", "dropout", "torchvision", "timm tiered", "timm"],
)
def test_a_stem_is_fused_up_to_its_pool(build, training):
    fused, eager = pair(build())
    assert "" in {choice.block for choice in fusedres.explain(fused, images()).choices}
    # A deep network amplifies every rounding, so both run eager's operations.
    with fusedres.use_backend("reference"):
        assert_matches_eager(fused.train(training), eager.train(training), images())


def test_the_report_names_the_stem():
    report = fusedres.fuse(resnet.resnet18())
    assert (report.rows[0].path, report.rows[0].family, report.rows[0].fused) == ("", "chain", ("bn1+relu+maxpool",))
    assert len(report.fused) == 9


def test_a_hook_in_the_stem_fires(kernels):
    fused, eager = pair(Net())
    calls = []
    for model in (fused, eager):
        model.act1.register_forward_hook(lambda *arguments: calls.append(1))
    assert_matches_eager(fused, eager, images(), path="eager")
    assert len(calls) == 2


def test_a_setting_of_the_network_is_watched(kernels):
    fused, eager = pair(Net())
    for model in (fused, eager):
        model.pool, model.fc = False, nn.Linear(4 * 32 * 32, 2).double()
        nn.init.ones_(model.fc.weight)
        nn.init.zeros_(model.fc.bias)
    assert_matches_eager(fused, eager, images())


@pytest.mark.parametrize("break_", ["hook", "patched"])
def test_a_stem_is_skipped_with_a_reason(break_):
    model = Net()
    if break_ == "hook":
        model.bn1.register_forward_hook(lambda *arguments: None)
    else:
        model.forward = lambda x: x
    report = fusedres.fuse(model)
    code = Code.HOOKS if break_ == "hook" else Code.PATCHED
    assert [(row.path, row.code) for row in report.skipped] == [("", code)]
    assert [row.path for row in report.fused] == ["layer1.0"]


class Skips(Net):
    """Uses a result twice."""

    def forward(self, x):
        x = self.act1(self.bn1(self.conv1(x)))
        return self.layer1(x) + x


class Branches(Net):
    def forward(self, x):
        return super().forward(x) if x.shape[0] > 1 else x


class UsesInput(Net):
    def forward(self, x):
        y = self.layer1(self.act1(self.bn1(self.conv1(x))))
        return y.expand_as(x)


class ReturnsEarly(Net):
    def forward(self, x):
        x = self.act1(self.bn1(self.conv1(x)))
        self.layer1(x)
        return x


@pytest.mark.parametrize("kind", [Skips, Branches, UsesInput, ReturnsEarly], ids=lambda kind: kind.__name__)
def test_what_is_no_chain_keeps_its_stem(kind):
    model = kind()
    report = fusedres.fuse(model, only=kind)
    assert type(model) is kind and "chain" not in {row.family for row in report.rows}


def test_a_quantizable_network_keeps_its_stem():
    report = fusedres.fuse(torchvision.models.quantization.resnet18(num_classes=2))
    assert not report.fused

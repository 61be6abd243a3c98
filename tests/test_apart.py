"""Modules that hold what follows them are taken apart: convolutions with their norms, norms with their activations."""

import copy

import optional
import pytest
import torch
import torch.nn.functional as F
from detection_blocks import Conv2d, Detectron2Basic, Detectron2Bottleneck, MmdetBottleneck, frozen
from eager import assert_matches_eager, assert_same_error, randomise, sample
from torch import nn
from user_blocks import Convolutions

import fusedres
from fusedres import dispatch
from fusedres.apart import alone
from fusedres.proof import prove
from fusedres.report import Code, Objection
from fusedres.swap import Fused

timm_layers = optional.package("timm.layers")


def pair(build):
    """A block that has run fused, and its eager twin."""
    block = build().double()
    randomise(block)
    eager = copy.deepcopy(block)
    fusedres.fuse(block, strict=True)
    block.eval()(batch())
    return block.train(), eager


def batch():
    return sample(3, 8, 6, 6)


def projection():
    return Detectron2Bottleneck(8, 12, stride=2)


def norm_act():
    return nn.Sequential(nn.Conv2d(8, 4, 3, bias=False), timm_layers.BatchNormAct2d(4), nn.MaxPool2d(2))


@pytest.mark.parametrize("build", [Detectron2Basic, projection, lambda: Detectron2Bottleneck(8, 12, norm=frozen)])
def test_the_report_names_norms_by_their_convolutions(build):
    (row,) = fusedres.fuse(block := build(), strict=True).fused
    assert row.family == "by its forward" and row.fused[0] == "conv1.norm+relu"
    last = "conv2.norm" if isinstance(block, Detectron2Basic) else "conv3.norm"
    shortcut = "" if block.shortcut is None else "+shortcut.norm"
    assert row.fused[-1] == f"{last}{shortcut}+add+relu" and not row.plain


def test_what_is_alone_shares_its_state():
    conv = Conv2d(3, 4, 3, norm=nn.BatchNorm2d(4))
    own = alone(conv)
    assert type(own) is nn.Conv2d and own.__dict__ is conv.__dict__ and own.weight is conv.weight
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(own(x), F.conv2d(x, conv.weight, conv.bias))
    norm = timm_layers.BatchNormAct2d(3)
    torch.testing.assert_close(alone(norm)(x), nn.BatchNorm2d(3)(x))
    assert norm.num_batches_tracked == 1
    assert alone(plain := nn.Conv2d(3, 4, 3)) is plain


def double(module, arguments, y):
    return 2 * y


CONVOLUTION_CHANGES = {
    "hook": (lambda block: block.conv1.register_forward_hook(double), "eager"),
    "norm hook": (lambda block: block.conv2.norm.register_forward_hook(double), "eager"),
    "norm taken": (lambda block: setattr(block.conv2, "norm", None), "eager"),
    "norm replaced": (lambda block: setattr(block.conv2, "norm", nn.BatchNorm2d(6, affine=False).double()), "fused"),
    "activation given": (lambda block: setattr(block.conv2, "activation", F.silu), "eager"),
    "activation module given": (lambda block: setattr(block.conv2, "activation", nn.SiLU()), "eager"),
    "dilation": (lambda block: block.conv2.__dict__.update(dilation=(2, 2), padding=(2, 2)), "fused"),
    "bias given": (lambda block: setattr(block.conv2, "bias", nn.Parameter(torch.ones(6).double())), "fused"),
    "padding mode": (lambda block: setattr(block.conv2, "padding_mode", "reflect"), "eager"),
    "shortcut hook": (lambda block: block.shortcut.register_forward_hook(double), "eager"),
}


@pytest.mark.parametrize("change", CONVOLUTION_CHANGES)
def test_a_changed_convolution_with_a_norm_is_seen(change, kernels):
    block, eager = pair(projection)
    apply, path = CONVOLUTION_CHANGES[change]
    for network in (block, eager):
        apply(network)
    assert_matches_eager(block, eager, batch(), path=path)


NORM_CHANGES = {
    "hook": (lambda norm: norm.register_forward_hook(double), "eager"),
    "act hook": (lambda norm: norm.act.register_forward_hook(double), "eager"),
    "act replaced": (lambda norm: setattr(norm, "act", nn.SiLU()), "fused"),
    "drop replaced": (lambda norm: setattr(norm, "drop", nn.Dropout(0.5)), "fused"),
    "frozen": (lambda norm: norm.eval(), "fused"),
    "momentum": (lambda norm: setattr(norm, "momentum", None), "fused"),
}


@pytest.mark.parametrize("change", NORM_CHANGES)
def test_a_changed_norm_with_an_activation_is_seen(change, kernels):
    block, eager = pair(norm_act)
    apply, path = NORM_CHANGES[change]
    for network in (block, eager):
        apply(network[1])
    assert_matches_eager(block, eager, batch(), path=path)


def test_half_activations_with_frozen_norms_are_eagers(kernels):
    """A frozen norm promotes; calling it alone must not call its activation."""
    block = nn.Sequential(nn.Conv2d(8, 4, 3), timm_layers.FrozenBatchNormAct2d(4, act_layer=nn.SiLU))
    eager = copy.deepcopy(block)
    fusedres.fuse(block, strict=True)
    x = batch().float()
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = block(x), eager(x)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected)


def test_an_empty_batch_takes_the_blocks_own_forward():
    """The forward asks for the size, and the proof takes the answer for granted."""
    block, eager = pair(projection)
    for network in (block, eager):
        network.conv1.norm = nn.SyncBatchNorm(6).double()
    assert_same_error(block, eager, batch()[:0])
    with dispatch.recording(block) as choices:
        block.eval()(batch()[:0])
    assert choices[0].objections["fused"] == "the input is empty"


@pytest.mark.parametrize("build", [projection, norm_act], ids=["convolution", "norm"])
def test_compiled_it_is_what_its_forward_says(build):
    block, eager = pair(build)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    x = batch()
    torch.testing.assert_close(compiled(x), eager(x))


def test_copies_are_taken_apart_anew():
    block, _ = pair(projection)
    twin = copy.deepcopy(block)
    nn.init.zeros_(twin.conv3.weight)
    assert isinstance(twin, Fused) and block.conv3.weight.any()
    x = batch()
    unfused = copy.deepcopy(twin)
    fusedres.unfuse(unfused)
    torch.testing.assert_close(twin(x), unfused(x))


@pytest.mark.parametrize("conversion", ["torch", "timm"])
def test_a_converted_norm_is_a_norm(conversion):
    model = nn.Sequential(nn.Conv2d(8, 4, 3), timm_layers.BatchNormAct2d(4))
    if conversion == "torch":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # drops the activation, which timm warns of
        assert not fusedres.fuse(model).fused
        return
    model = timm_layers.convert_sync_batchnorm(model).double().eval()
    eager = copy.deepcopy(model)
    assert fusedres.fuse(model, strict=True).fused
    assert_matches_eager(model, eager, batch())


class HardCoded(Convolutions):
    """Its own call of the function, with settings that are the convolution's."""

    def forward(self, x):
        out = F.relu(self.bn1(F.conv2d(x, self.conv1.weight, self.conv1.bias, (1, 1), (1, 1), (1, 1), 1)))
        return F.relu(self.bn2(self.conv2(out)) + x)


def test_settings_written_in_the_forward_are_held_to_the_convolutions(kernels):
    block = HardCoded().double()
    eager = copy.deepcopy(block)
    assert fusedres.fuse(block, strict=True).fused
    x = sample()
    assert_matches_eager(block.eval(), eager.eval(), x)
    for network in (block, eager):
        network.conv1.dilation = network.conv1.padding = (2, 2)
    assert_matches_eager(block.train(), eager.train(), x, path="eager")


class OtherStride(Convolutions):
    def forward(self, x):
        out = F.relu(self.bn1(F.conv2d(x, self.conv1.weight, self.conv1.bias, (1, 1), (1, 1), (2, 2), 1)))
        return F.relu(self.bn2(self.conv2(out)) + x)


class BorrowedBias(Convolutions):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, 1, 1)

    def forward(self, x):
        out = F.conv2d(x, self.conv1.weight, self.bn1.bias, (1, 1), (1, 1), (1, 1), 1)
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(out)))) + x)


class ReadsSize(Convolutions):
    def forward(self, x):
        return F.relu(self.branch(x) + x) if x.numel() == 100 else x


class OwnWeight(nn.Conv2d):
    """The block is itself the convolution."""

    def __init__(self):
        super().__init__(4, 4, 3, 1, 1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        y = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        return F.relu(self.norm(y) + x)


class Reflects(Detectron2Basic):
    """A convolution whose forward does not look at its padding mode."""

    def __init__(self):
        super().__init__()
        self.conv1.padding_mode = "reflect"


@pytest.mark.parametrize(
    "kind", [OtherStride, BorrowedBias, ReadsSize, OwnWeight, Reflects], ids=lambda kind: kind.__name__
)
def test_what_is_not_one_convolution_is_left_alone(kind):
    found = prove(kind())
    assert isinstance(found, Objection) and found.code is Code.UNPROVEN


@pytest.mark.parametrize("setting", ["with_cp", "with_plugins", "norm2_name"])
def test_a_flag_of_mmdetection_is_watched(setting, kernels):
    block, eager = pair(MmdetBottleneck)
    for network in (block, eager):
        if setting == "with_plugins":
            network.forward_plugin = lambda x, names: 2 * x
            for number in (1, 2, 3):
                setattr(network, f"after_conv{number}_plugin_names", ["doubles"])
        setattr(network, setting, "bn1" if setting == "norm2_name" else True)
    assert_matches_eager(block, eager, batch(), path="eager")

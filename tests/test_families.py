"""Every family against its own eager forward, and every description against the proof of its forward."""

import copy
from dataclasses import replace
from functools import partial

import hugging_face
import optional
import pytest
import torch
from detection_blocks import DETECTRON2, MMDET
from eager import assert_matches_eager, randomise, sample
from torch import nn
from torchvision_models import FrozenBatchNorm2d, resnet, torchvision

import fusedres
from fusedres import families
from fusedres.epilogue import find, of_module
from fusedres.proof import prove
from fusedres.report import Code, Objection
from fusedres.residual import Residual, Stage
from fusedres.swap import Fused

timm = optional.package("timm")
from timm.layers import (  # noqa: E402
    BatchNormAct2d,
    BlurPool2d,
    ConvNormAct,
    DropBlock2d,
    DropPath,
    FrozenBatchNormAct2d,
    create_attn,
)
from timm.models import resnet as timm_resnet  # noqa: E402


def projection(inplanes, planes, stride=1, pool=False):
    layers = [nn.AvgPool2d(2, stride)] if pool else []
    stride = 1 if pool else stride
    return nn.Sequential(*layers, nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))


def attention(name):
    return lambda channels, **options: create_attn(name, channels, **options)


def basic(**options):
    return timm_resnet.BasicBlock(8, 8, **options)


def bottleneck(planes=2, **options):
    return timm_resnet.Bottleneck(8, planes, **options)


def norm_act(kind=BatchNormAct2d, **options):
    """Not with a ReLU: before the block's own, which is in place, eager's backward refuses it."""
    return partial(kind, act_layer=nn.SiLU, **options)


def norm_act_projection():
    return nn.Sequential(nn.Conv2d(8, 8, 1, 2, bias=False), BatchNormAct2d(8, apply_act=False))


def drop_block():
    return DropBlock2d(drop_prob=0.3, block_size=3)


TIMM = {
    "basic": basic,
    "basic projection": lambda: basic(stride=2, downsample=projection(8, 8, 2)),
    "basic reduce_first": lambda: basic(reduce_first=2),
    "basic drop_block": lambda: basic(drop_block=drop_block),
    "basic drop_path": lambda: basic(drop_path=DropPath(0.5)),
    "basic aa": lambda: basic(stride=2, downsample=projection(8, 8, 2), aa_layer=BlurPool2d),
    "basic eca": lambda: basic(attn_layer=attention("eca")),
    "basic silu": lambda: basic(act_layer=nn.SiLU),
    "bottleneck": bottleneck,
    "bottleneck avg_down": lambda: bottleneck(stride=2, downsample=projection(8, 8, 2, pool=True)),
    "bottleneck se drop_path": lambda: bottleneck(attn_layer=attention("se"), drop_path=DropPath(0.5)),
    "bottleneck eca drop_path": lambda: bottleneck(attn_layer=attention("eca"), drop_path=DropPath(0.5)),
    "bottleneck gc": lambda: bottleneck(attn_layer=attention("gc")),
    "bottleneck cbam": lambda: bottleneck(attn_layer=attention("cbam")),
    "bottleneck drop_block aa": lambda: bottleneck(
        stride=2, downsample=projection(8, 8, 2), drop_block=drop_block, aa_layer=BlurPool2d
    ),
    "bottleneck cardinality": lambda: bottleneck(cardinality=2),
    "bottleneck dilation": lambda: bottleneck(dilation=2, first_dilation=1),
    "bottleneck gelu": lambda: bottleneck(act_layer=timm.layers.get_act_layer("gelu")),
    "basic norm act": lambda: basic(norm_layer=norm_act()),
    "basic norm act drop_path": lambda: basic(norm_layer=norm_act(), act_layer=nn.SiLU, drop_path=DropPath(0.5)),
    "bottleneck norm act": lambda: bottleneck(norm_layer=norm_act(), stride=2, downsample=norm_act_projection()),
    "bottleneck norm without act": lambda: bottleneck(norm_layer=norm_act(apply_act=False)),
    "bottleneck norm act drop_block": lambda: bottleneck(norm_layer=norm_act(drop_layer=drop_block)),
    "bottleneck frozen norm act": lambda: bottleneck(norm_layer=norm_act(FrozenBatchNormAct2d)),
    "bottleneck prelu": lambda: bottleneck(act_layer=timm.layers.get_act_layer("prelu")),
}
TORCHVISION = {
    "basic": lambda: resnet.BasicBlock(8, 8),
    "basic projection": lambda: resnet.BasicBlock(8, 6, 2, projection(8, 6, 2)),
    "bottleneck": lambda: resnet.Bottleneck(8, 2),
    "bottleneck projection": lambda: resnet.Bottleneck(8, 3, 2, projection(8, 12, 2)),
    "resnext": lambda: resnet.Bottleneck(8, 2, groups=2, base_width=64),
    "dilated": lambda: resnet.Bottleneck(8, 2, dilation=2),
    "frozen": lambda: resnet.Bottleneck(8, 2, norm_layer=FrozenBatchNorm2d),
    "inverted residual": lambda: torchvision.models.mobilenetv2.InvertedResidual(8, 8, 1, 2),
}
HUGGING_FACE = {kind: partial(hugging_face.layer, kind) for kind in hugging_face.LAYERS}
SEQUENTIAL = {
    "run": lambda: nn.Sequential(nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
    "two runs and a pool": lambda: nn.Sequential(
        nn.Conv2d(8, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.SiLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 1),
        nn.BatchNorm2d(4),
        nn.ReLU6(),
        nn.Conv2d(4, 4, 1),
        nn.BatchNorm2d(4),
    ),
    "torchvision": lambda: torchvision.ops.Conv2dNormActivation(8, 4),
    "norm act": lambda: nn.Sequential(nn.Conv2d(8, 4, 3), BatchNormAct2d(4, act_layer=nn.SiLU), nn.Conv2d(4, 4, 1)),
    "norm act, pool": lambda: nn.Sequential(nn.Conv2d(8, 4, 3), BatchNormAct2d(4), nn.MaxPool2d(3, 2, 1)),
    "norm act, act": lambda: nn.Sequential(nn.Conv2d(8, 4, 3), BatchNormAct2d(4), nn.SiLU(), nn.MaxPool2d(2)),
    "frozen norm act": lambda: nn.Sequential(nn.Conv2d(8, 4, 3), FrozenBatchNormAct2d(4)),
    "timm": lambda: ConvNormAct(8, 4, 3),
    "timm anti-aliasing": lambda: ConvNormAct(8, 4, 3, stride=2, aa_layer=BlurPool2d, act_layer=nn.SiLU),
}
BLOCKS = [
    pytest.param(build, id=f"{family}-{name}")
    for family, blocks in (
        ("timm", TIMM),
        ("torchvision", TORCHVISION),
        ("transformers", HUGGING_FACE),
        ("by structure", DETECTRON2 | MMDET),
        ("sequential", SEQUENTIAL),
    )
    for name, build in blocks.items()
]


def pair(build):
    block = build().double()
    randomise(block)
    eager = copy.deepcopy(block)
    report = fusedres.fuse(block, strict=True)
    assert len(report.fused) == 1, str(report)
    return block, eager


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("build", BLOCKS)
def test_a_fused_block_matches_its_eager_self(build, training, backend):
    fused, eager = pair(build)
    assert isinstance(fused, Fused)
    # A frozen norm rounds in another order.
    frozen = any(isinstance(module, FrozenBatchNorm2d | FrozenBatchNormAct2d) for module in fused.modules())
    exact = False if frozen else None
    assert_matches_eager(fused.train(training), eager.train(training), sample(3, 8, 6, 6), exact=exact)


def active(block, paths):
    """Without children that are absent or do nothing, which a trace can't name."""
    children = dict(block.named_modules())
    return tuple(path for path in paths if path and path in children and not isinstance(children[path], nn.Identity))


def normal_form(block, residual):
    """A description without what differs in words only: inactive children, hosts, the identity's name."""
    stages = []
    for stage in residual.stages:
        after = active(block, stage.after_act)
        if isinstance(stage.act, str) and of_module(block.get_submodule(stage.act)) is None:
            stage, after = replace(stage, act=None), (stage.act, *after)
        stages.append(replace(stage, before_act=active(block, stage.before_act), after_act=after))
    shortcut = residual.shortcut
    if isinstance(shortcut, str):
        within = [path for path, _ in block.named_modules() if path.rpartition(".")[0] == shortcut != ""]
        shortcut = tuple(within) or (shortcut,)
    shortcut = None if shortcut is None else active(block, shortcut)
    return replace(residual, stages=tuple(stages), between=active(block, residual.between), shortcut=shortcut, hosts=())


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(build, id=f"{family}-{name}")
        for family, blocks in (("timm", TIMM), ("torchvision", TORCHVISION), ("transformers", HUGGING_FACE))
        for name, build in blocks.items()
        if name not in ("basic drop_block", "bottleneck drop_block aa", "bottleneck gc", "bottleneck cbam")
    ],
)
def test_a_description_is_what_the_forward_proves(build):
    block = build()
    described = families.find(block).description
    proven = prove(block)
    assert isinstance(proven, Residual), proven
    assert normal_form(block, described) == normal_form(block, proven)


LATER = {
    "resnetv2_18": Code.UNSUPPORTED,
    "resnet50_gn": Code.NORM,
    "resnest14d": Code.UNSUPPORTED,
    "res2net50_14w_8s": Code.UNSUPPORTED,
    "legacy_seresnet18": Code.UNSUPPORTED,
}


@pytest.mark.parametrize("name, code", LATER.items())
def test_families_for_later_are_skipped_with_a_reason(name, code):
    model = timm.create_model(name, num_classes=2)
    report = fusedres.fuse(model)
    assert report.skipped and {row.code for row in report.skipped} == {code}
    assert all(row.reason for row in report.skipped)


@pytest.mark.parametrize("name, blocks", [("resnet32ts", 13), ("regnetx_002", 14), ("regnety_002", 14)])
def test_other_families_of_timm_are_proven_by_their_forwards(name, blocks):
    report = fusedres.fuse(timm.create_model(name, num_classes=2), strict=True)
    assert len(report.fused) == blocks and {row.family for row in report.rows} == {"by its forward"}


def test_a_registered_family_is_described_by_its_function():
    class Block(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)

        def forward(self, x):
            return torch.relu(x + self.norm(self.conv(x))) if x.numel() else x

    assert fusedres.fuse(Block(4)).skipped[0].code == Code.UNPROVEN
    name = f"{Block.__module__}.{Block.__qualname__}"

    @fusedres.register_family(name, "mine")
    def describe(block):
        if block.norm.affine:
            relu = find("relu")
            return Residual((Stage("conv", "norm"),), shortcut="", act=relu, adds_in_place=False)
        return Objection(Code.UNSUPPORTED, "it has no weights")

    try:
        block = Block(4).double()
        eager = copy.deepcopy(block)
        assert fusedres.fuse(block).fused[0].family == "mine"
        assert_matches_eager(block, eager, sample())
        bare = Block(4)
        bare.norm = nn.BatchNorm2d(4, affine=False)
        assert fusedres.fuse(bare).skipped[0].reason == "it has no weights"
    finally:
        del families.FAMILIES[name]

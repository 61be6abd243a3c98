"""A user's block is fused when its forward is proven to be the formula, and only then."""

import copy

import pytest
import torch
import torch.nn.functional as F
from eager import assert_matches_eager, assert_path, randomise, sample
from torch import nn
from user_blocks import PROVEN, UNPROVEN, Cifar, ConvNormAct, Gated, MmdetStyle, Nested, ReZero, Tutorial

import fusedres
from fusedres import dispatch
from fusedres.proof import prove
from fusedres.report import Code, Objection
from fusedres.residual import Residual


def pair(block):
    """A block fused, and its eager twin with the same parameters."""
    randomise(block)
    block = block.double()
    eager = copy.deepcopy(block)
    report = fusedres.fuse(block)
    assert [row.path for row in report.fused] == [""], str(report)
    return block, eager


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("sizes", [(4, 4, 1), (4, 6, 2)], ids=["identity", "projection"])
@pytest.mark.parametrize("kind", PROVEN, ids=lambda kind: kind.__name__)
def test_proven_blocks_match_eager(kind, sizes, training, backend):
    fused, eager = pair(kind(*sizes))
    assert_matches_eager(fused.train(training), eager.train(training), sample())


@pytest.mark.parametrize("kind", UNPROVEN, ids=lambda kind: kind.__name__)
def test_what_is_not_proven_is_left_alone(kind):
    block = kind()
    report = fusedres.fuse(block)
    assert not report.fused and type(block) is kind
    assert [row.code for row in report.skipped] == [Code.UNPROVEN]


def test_projections_are_taken_apart():
    for kind in (Cifar, Tutorial, MmdetStyle):
        (row,) = fusedres.fuse(kind(4, 6, 2)).fused
        assert row.fused[-1] == f"bn2+{'shortcut' if kind is Cifar else 'downsample'}.1+add+relu"
    (row,) = fusedres.fuse(Nested(4, 6, 2)).fused
    assert row.fused == ("layers.0.norm+silu", "layers.1.norm+project.norm+add+silu")
    (row,) = fusedres.fuse(Gated()).fused
    assert row.fused == ("bn1+relu", "bn2+gamma+add") and row.plain == ("dropout",)


def test_the_trace_leaves_the_block_alone():
    block = Tutorial().train()
    before = dict(block.__dict__)
    assert isinstance(prove(block), Residual)
    assert block.__dict__ == before and type(block) is Tutorial
    assert all(module.training for module in block.modules())


def test_a_setting_that_changes_after_fuse_is_seen(kernels):
    fused, eager = pair(MmdetStyle())
    for block in (fused, eager):
        block.with_cp = True
    with dispatch.recording(fused) as choices:
        fused.eval()(sample())
    assert "with_cp" in choices[0].objections["fused"]
    assert_matches_eager(fused.train(), eager, sample(), path="eager")


def test_a_projection_set_after_fuse_is_seen(kernels):
    fused, eager = pair(Tutorial())
    projection = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).double()
    fused.downsample, eager.downsample = projection, copy.deepcopy(projection)
    assert_matches_eager(fused, eager, sample(), path="eager")


def test_what_is_appended_to_a_projection_is_seen(kernels):
    fused, eager = pair(Cifar(4, 6, 2))
    for block in (fused, eager):
        block.shortcut.append(nn.Dropout(0.5))
    assert_matches_eager(fused, eager, sample(), path="eager")


def test_a_projection_without_its_norm_fails_as_in_eager():
    fused, eager = pair(Nested(4, 6, 2))
    for block in (fused, eager):
        block.project.norm = None
        with pytest.raises(TypeError, match="NoneType"):
            block(sample())


class Halved(ConvNormAct):
    def forward(self, x):
        return super().forward(x) / 2


@pytest.mark.parametrize("change", ["hook", "replaced", "longer"])
def test_a_module_passed_over_is_watched(change, kernels):
    fused, eager = pair(Nested())
    calls = []
    for block in (fused, eager):
        if change == "hook":
            block.layers[0].register_forward_hook(lambda module, args, y: calls.append(module))
        elif change == "replaced":
            block.layers[0].__class__ = Halved
        else:
            block.layers.append(nn.ReLU())
    assert_matches_eager(fused, eager, sample(), path="eager")
    assert len(calls) == (2 if change == "hook" else 0)


def test_a_sum_is_promoted_as_eager_promotes_it():
    for kind, expected in ((Cifar, torch.bfloat16), (Tutorial, torch.float32)):
        block = kind()
        eager = copy.deepcopy(block)
        fusedres.fuse(block)
        x = torch.randn(2, 4, 6, 6)
        with torch.autocast("cpu", torch.bfloat16), dispatch.recording(block) as choices:
            y, reference = block(x), eager(x)
        assert_path(choices, "fused")
        assert y.dtype == reference.dtype == expected
        torch.testing.assert_close(y, reference)


def test_a_number_as_gate_promotes_nothing():
    block = ReZero()
    eager = copy.deepcopy(block)
    fusedres.fuse(block)
    x = torch.randn(2, 4, 6, 6, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y, reference = block(x), eager(x)
    assert y.dtype == reference.dtype == torch.bfloat16


def test_modules_made_in_the_forward_are_entered():
    class Fresh(Cifar):
        def forward(self, x):
            return nn.ReLU()(self.branch(x) + self.shortcut(x))

    assert isinstance(prove(Fresh()), Residual)


def test_the_reason_names_what_stands_out():
    class Padded(Cifar):
        def forward(self, x):
            return F.relu(self.branch(F.pad(x, (1, 1, 1, 1))))

    found = prove(Padded())
    assert isinstance(found, Objection) and "pad" in found.reason

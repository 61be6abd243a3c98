"""Every way to set up a batch norm: what it computes, and how its statistics and counter move."""

import os
from functools import partial

import pytest
import torch
from eager import (
    assert_as_accurate_as_eager,
    assert_matches_eager,
    assert_same_error,
    identity_pair,
    pair,
    projection_pair,
    sample,
)
from torch import nn

from fusedres.testing import import_torchvision

BatchNorm2d = nn.BatchNorm2d
FrozenBatchNorm2d = import_torchvision().ops.FrozenBatchNorm2d

NORM_LAYERS = {
    "default": BatchNorm2d,
    "momentum=None": partial(BatchNorm2d, momentum=None),
    "momentum=0": partial(BatchNorm2d, momentum=0.0),
    "momentum=1": partial(BatchNorm2d, momentum=1.0),
    "eps": partial(BatchNorm2d, eps=0.3),
    "track_running_stats=False": partial(BatchNorm2d, track_running_stats=False),
    "momentum=None, track_running_stats=False": partial(BatchNorm2d, momentum=None, track_running_stats=False),
    "affine=False": partial(BatchNorm2d, affine=False),
    "neither affine nor tracking": partial(BatchNorm2d, affine=False, track_running_stats=False),
    "SyncBatchNorm": nn.SyncBatchNorm,
    "SyncBatchNorm, momentum=None": partial(nn.SyncBatchNorm, momentum=None),
    "FrozenBatchNorm2d": FrozenBatchNorm2d,
    "FrozenBatchNorm2d, eps": partial(FrozenBatchNorm2d, eps=0.1),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("build", [identity_pair, projection_pair])
@pytest.mark.parametrize("layer", NORM_LAYERS)
def test_a_norm_layer_computes_and_tracks_as_in_eager(layer, build, training, backend):
    fused, eager = build(norm_layer=NORM_LAYERS[layer])
    for seed in range(3):
        torch.manual_seed(seed)
        # FrozenBatchNorm2d multiplies and adds; the reference normalises: equal, but not to the last bit.
        exact = False if "Frozen" in layer else None
        assert_matches_eager(fused.train(training), eager.train(training), sample(), exact=exact)


@pytest.mark.parametrize("training", [True, False])
def test_a_group_norm_layer_takes_the_eager_path(training, backend):
    fused, eager = projection_pair(norm_layer=partial(nn.GroupNorm, 2))
    assert_matches_eager(fused.train(training), eager.train(training), sample(), path="eager")


def test_the_counter_and_the_statistics_move_once_a_training_step_and_never_in_eval(backend):
    fused, _ = projection_pair()
    norms = [module for module in fused.modules() if isinstance(module, BatchNorm2d)]
    before = [norm.running_var.clone() for norm in norms]
    fused(sample())
    fused(sample())
    assert [norm.num_batches_tracked.item() for norm in norms] == [2, 2, 2]
    assert not any(torch.equal(norm.running_var, var) for norm, var in zip(norms, before, strict=True))
    before = [norm.running_var.clone() for norm in norms]
    fused.eval()(sample())
    assert [norm.num_batches_tracked.item() for norm in norms] == [2, 2, 2]
    assert all(torch.equal(norm.running_var, var) for norm, var in zip(norms, before, strict=True))


@pytest.mark.parametrize("frozen", ["bn1", "bn2", "shortcut.1"])
def test_a_norm_in_eval_mode_inside_training_keeps_its_statistics(frozen, backend):
    fused, eager = projection_pair()
    for block in (fused, eager):
        block.get_submodule(frozen).eval()
    assert_matches_eager(fused, eager, sample())


@pytest.mark.parametrize("frozen", ["bn1.weight", "bn1.bias", "bn2.weight", "bn2.bias", "shortcut.1.weight"])
def test_a_frozen_parameter_has_no_gradient_and_the_others_have_theirs(frozen, backend):
    fused, eager = projection_pair()
    for block in (fused, eager):
        block.get_parameter(frozen).requires_grad_(False)
    assert_matches_eager(fused, eager, sample())
    assert fused.get_parameter(frozen).grad is None


@pytest.mark.parametrize("trained", ["conv1.weight", "bn2.bias", "shortcut.1.weight", "shortcut.0.weight"])
def test_one_trained_parameter_alone_has_eagers_gradient(trained, backend):
    fused, eager = projection_pair()
    for block in (fused, eager):
        block.requires_grad_(False)
        block.get_parameter(trained).requires_grad_()
    x = sample()
    fused(x).square().sum().backward()
    eager(x).square().sum().backward()
    torch.testing.assert_close(
        fused.get_parameter(trained).grad, eager.get_parameter(trained).grad, rtol=1e-10, atol=1e-11
    )


def test_a_counter_taken_away_is_not_counted(backend):
    fused, eager = projection_pair()
    for block in (fused, eager):
        for norm in (block.bn1, block.bn2, block.shortcut[1]):
            norm.num_batches_tracked = None
    assert_matches_eager(fused, eager, sample())


def test_tracking_switched_off_after_construction_uses_the_batch_and_keeps_the_statistics(backend):
    fused, eager = projection_pair()
    for block in (fused, eager):
        for norm in (block.bn1, block.bn2, block.shortcut[1]):
            norm.track_running_stats = False
    assert_matches_eager(fused, eager, sample())
    assert_matches_eager(fused.eval(), eager.eval(), sample())


def test_one_norm_used_twice_counts_twice(backend):
    fused, eager = identity_pair()
    for block in (fused, eager):
        block.bn2 = block.bn1
    assert_matches_eager(fused, eager, sample())
    assert fused.bn1.num_batches_tracked == 2


@pytest.mark.parametrize("momentum", [0.1, None])
def test_one_norm_on_both_sides_of_the_addition_moves_twice_in_eagers_order(momentum, backend):
    fused, eager = projection_pair(norm_layer=partial(BatchNorm2d, momentum=momentum))
    for block in (fused, eager):
        block.bn2 = block.shortcut[1]
    assert_matches_eager(fused, eager, sample(), path="eager")


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(os.name == "nt", reason="gloo's meeting over a file is tried on Linux and macOS")
def test_sync_batch_norm_in_a_group_of_one_is_a_plain_one(process_group, backend):
    fused, _ = projection_pair(norm_layer=nn.SyncBatchNorm)
    plain, eager = projection_pair()
    for block in (plain, eager):
        block.load_state_dict(fused.state_dict())
    assert_matches_eager(fused, eager, sample())  # eager's own takes no CPU tensor in training


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [("BasicBlock", 8, 8), ("Bottleneck", 8, 4, 2)], ids=lambda block: block[0])
def test_a_module_in_a_lower_precision_is_as_accurate_as_eager(block, dtype, layout, training, backend):
    def build():
        return [module.train(training) for module in pair(*block, dtype=dtype)]

    assert_as_accurate_as_eager(build, lambda: sample(4, 8, 10, 10, dtype=dtype).to(memory_format=layout))


def norms_of(block):
    return [block.bn1, block.bn2, block.shortcut[1]]


@pytest.mark.parametrize("training", [True, False])
def test_half_convolutions_with_fp32_norms_are_as_accurate_as_eager(training, backend):
    def build():
        blocks = projection_pair(dtype=torch.bfloat16)
        for block in blocks:
            block.train(training)
            for norm in norms_of(block):
                norm.float()
        return blocks

    assert_as_accurate_as_eager(build, lambda: sample(4, 4, 8, 8, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_norms_of_a_dtype_that_eager_refuses_are_refused_in_its_words(dtypes, backend):
    convolutions, norms = dtypes
    fused, eager = projection_pair(dtype=convolutions)
    for block in (fused, eager):
        for norm in norms_of(block):
            norm.to(norms)
    assert_same_error(fused, eager, sample(dtype=convolutions))

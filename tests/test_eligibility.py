"""What fuse leaves alone, with which reason; and that leaving alone changes nothing."""

import copy

import pytest
import torch
import torch.nn.utils.parametrizations as parametrizations
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import prune
from torchvision_models import FrozenBatchNorm2d, quantizable_resnet18, resnet
from user_blocks import Cifar

import fusedres
from fusedres.report import Code
from fusedres.swap import Fused


def hook(block):
    block.bn1.register_forward_hook(lambda *arguments: None)


def hook_backward(block):
    block.relu.register_full_backward_hook(lambda *arguments: None)


def parametrize(block):
    parametrizations.weight_norm(block.conv1)


def weight_norm(block):
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(block.conv1)


def prune_conv(block):
    prune.l1_unstructured(block.conv1, "weight", 0.5)


def patch(block):
    block.forward = lambda x: x


def patch_child(block):
    block.bn2.forward = lambda x: x


def other_norm(block):
    block.bn1 = nn.GroupNorm(2, 4)


def norm_subclass(block):
    class Custom(nn.BatchNorm2d):
        pass

    block.bn2 = Custom(4)


def lazy_norm(block):
    block.bn2 = nn.LazyBatchNorm2d()


def share_norm(block):
    block.bn2 = block.bn1


def share_conv(block):
    block.conv2 = block.conv1


def missing(block):
    block.relu = None


def to_meta(block):
    block.to("meta")


def quantize(block):
    block.conv1 = torch.ao.nn.qat.Conv2d(4, 4, 3, 1, 1, qconfig=torch.ao.quantization.default_qat_qconfig)


BREAKS = [
    (hook, Code.HOOKS),
    (hook_backward, Code.HOOKS),
    (patch_child, Code.HOOKS),
    (parametrize, Code.PARAMETRIZED),
    (weight_norm, Code.PARAMETRIZED),
    (prune_conv, Code.PARAMETRIZED),
    (patch, Code.PATCHED),
    (other_norm, Code.NORM),
    (norm_subclass, Code.NORM),
    (lazy_norm, Code.NORM),
    (share_norm, Code.SHARED),
    (share_conv, Code.SHARED),
    (missing, Code.STRUCTURE),
    (to_meta, Code.META),
    (quantize, Code.QUANTIZED),
]


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.parametrize("change, code", BREAKS, ids=[change.__name__ for change, _ in BREAKS])
def test_a_block_is_skipped_with_a_reason(change, code):
    model = nn.Sequential(resnet.BasicBlock(4, 4), resnet.BasicBlock(4, 4))
    change(model[0])
    inside = dict(model[0].__dict__)
    report = fusedres.fuse(model)
    assert [(row.path, row.code) for row in report.skipped] == [("0", code)], str(report)
    assert report.skipped[0].reason and [row.path for row in report.fused] == ["1"]
    assert type(model[0]) is resnet.BasicBlock and model[0].__dict__ == inside


def test_a_hook_on_a_convolution_is_no_obstacle():
    block, calls = resnet.BasicBlock(4, 4), []
    block.conv1.register_forward_hook(lambda *arguments: calls.append(1))
    assert fusedres.fuse(block).fused
    block(torch.randn(2, 4, 5, 5))
    assert calls == [1]


def test_blocks_held_in_two_places_are_shared():
    block = resnet.BasicBlock(4, 4)
    report = fusedres.fuse(nn.Sequential(block, block))
    assert [(row.path, row.code) for row in report.skipped] == [("0", Code.SHARED)]
    model = nn.Sequential(resnet.BasicBlock(4, 4), resnet.BasicBlock(4, 4))
    model[1].bn1 = model[0].bn1
    assert [row.code for row in fusedres.fuse(model).skipped] == [Code.SHARED] * 2
    model[1].bn1 = nn.BatchNorm2d(4)
    model[1].relu = model[0].relu  # an activation keeps nothing
    assert len(fusedres.fuse(model).fused) == 2


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
def test_compiled_and_traced_modules_are_left_alone():
    block = Cifar().eval()
    traced = torch.fx.symbolic_trace(block)
    scripted = torch.jit.trace(block, torch.randn(1, 4, 5, 5))
    report = fusedres.fuse(nn.Sequential(traced, scripted, Cifar()))
    assert [(row.path, row.code) for row in report.skipped] == [("0", Code.SCRIPTED), ("1", Code.SCRIPTED)]
    assert [row.path for row in report.fused] == ["2"]


def test_a_norm_called_twice_is_shared():
    class Twice(Cifar):
        def forward(self, x):
            return torch.relu(self.bn1(self.conv1(torch.relu(self.bn1(self.conv1(x))))) + x)

    report = fusedres.fuse(Twice())
    assert [row.code for row in report.skipped] == [Code.SHARED] and "called more than once" in str(report)


def test_a_sequential_with_its_own_forward_is_left_alone():
    class Backwards(nn.Sequential):
        def forward(self, x):
            for module in reversed(self):
                x = module(x)
            return x

    assert not fusedres.fuse(Backwards(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())).rows


def test_fully_sharded_parameters_are_left_alone(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        model = fully_shard(nn.Sequential(Cifar()), mesh=mesh)
        assert [(row.path, row.code) for row in fusedres.fuse(model).skipped] == [("0", Code.SHARDED)]
    finally:
        torch.distributed.destroy_process_group()


def test_sharded_modules_are_left_alone():
    class FullyShardedDataParallel(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    class FSDPModule:
        pass

    class ShardedCifar(FSDPModule, Cifar):
        pass

    report = fusedres.fuse(nn.Sequential(FullyShardedDataParallel(Cifar()), ShardedCifar()))
    assert [(row.path, row.code) for row in report.skipped] == [("0", Code.SHARDED), ("1", Code.SHARDED)]


def test_classes_that_watch_their_subclasses_are_left_alone():
    known = []

    class Registered(resnet.BasicBlock):
        def __init_subclass__(cls):
            known.append(cls)

    class Meta(type):
        pass

    class WithMeta(resnet.BasicBlock, metaclass=Meta):
        pass

    for kind in (Registered, WithMeta):
        report = fusedres.fuse(kind(4, 4))
        assert [row.code for row in report.skipped] == [Code.CLASS]
    assert not known


def test_quantizable_blocks_are_skipped():
    report = fusedres.fuse(quantizable_resnet18())
    blocks = [row for row in report.rows if row.path.startswith("layer")]
    assert len(blocks) == 8 and {row.code for row in blocks} == {Code.QUANTIZED}


def test_a_subclass_with_its_own_forward_is_judged_by_it():
    class Keeps(resnet.BasicBlock):
        pass

    class Doubles(resnet.BasicBlock):
        def forward(self, x):
            return 2 * super().forward(x)

    assert fusedres.fuse(Keeps(4, 4)).fused[0].family == "torchvision"
    report = fusedres.fuse(Doubles(4, 4))
    assert not report.fused and report.skipped[0].code == Code.UNPROVEN


def test_frozen_norms_are_fused():
    block = resnet.BasicBlock(4, 4, norm_layer=FrozenBatchNorm2d)
    eager = copy.deepcopy(block)
    assert fusedres.fuse(block).fused
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(block(x), eager(x))


def test_nothing_below_an_error_is_changed(monkeypatch):
    model = nn.Sequential(Cifar(), Cifar())
    monkeypatch.setattr("fusedres.eligibility._sharing", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fusedres.fuse(model)
    assert not any(isinstance(module, Fused) for module in model.modules())


def test_an_error_while_classes_change_changes_none():
    class Guarded(Cifar):
        def __setattr__(self, name, value):
            if name == "__class__":
                raise RuntimeError("hands off")
            super().__setattr__(name, value)

    model = nn.Sequential(Cifar(), Guarded())
    with pytest.raises(RuntimeError, match="hands off"):
        fusedres.fuse(model)
    assert [type(module) for module in model] == [Cifar, Guarded]

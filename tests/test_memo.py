"""What a block was resolved to is kept between calls, and given up as soon as anything it was read from changes."""

import copy
import pickle
from collections import OrderedDict

import pytest
import torch
from eager import assert_matches_eager, randomise, sample
from torch import nn
from torchvision_models import resnet
from user_blocks import Gated, MmdetStyle, Nested

import fusedres
from fusedres import memo, residual
from fusedres.swap import Fused


@pytest.fixture
def resolved(monkeypatch):
    """How often a block was resolved."""
    calls, resolve = [], residual._resolve

    def counted(*arguments):
        calls.append(arguments)
        return resolve(*arguments)

    monkeypatch.setattr(residual, "_resolve", counted)
    return calls


def projection():
    return nn.Sequential(nn.Conv2d(4, 8, 1, 2, bias=False), nn.BatchNorm2d(8))


def bottleneck():
    return resnet.Bottleneck(4, 2, 2, projection())


def leaky():
    block = resnet.BasicBlock(4, 4)
    block.relu = nn.LeakyReLU(inplace=True)
    return block


def gelu():
    block = resnet.BasicBlock(4, 4)
    block.relu = nn.GELU()
    return block


def pair(build):
    """A block that has run fused, and its eager twin; one of fusedres's own needs no fuse."""
    block = build().double()
    randomise(block)
    eager = copy.deepcopy(block)
    if isinstance(block, fusedres.Bottleneck):
        eager.forward = eager.eager_forward
    else:
        fusedres.fuse(block, strict=True)
    block.eval()(sample())
    return block.train(), eager


def own():
    return fusedres.Bottleneck(4, 2, 2)


@pytest.mark.parametrize(
    "build", [bottleneck, leaky, Nested, MmdetStyle, Gated], ids=["projection", "leaky", "nested", "settings", "gated"]
)
def test_a_block_is_resolved_once(build, resolved):
    block, eager = pair(build)
    del resolved[:]
    for training in (True, False, True):
        block.train(training)(sample())
    block.load_state_dict(eager.state_dict())
    block.float()(sample(dtype=torch.float32))
    assert not resolved


def double(module, arguments, y):
    return 2 * y


def double_gradients(module, gradients, *outputs):
    return tuple(2 * gradient for gradient in gradients)


def replace_hooks(block):
    """Not through `register_forward_hook`, and in a dictionary of its own."""
    block.bn1._forward_hooks = OrderedDict({0: double})


class Halved(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) / 2


def replace_class(block):
    block.bn1.__class__ = Halved


def patch_act(block):
    block.relu.forward = lambda x: x.clamp(0, 1)


def replace_conv(block):
    block.conv2 = nn.Conv2d(2, 2, 1, 2).double()
    nn.init.constant_(block.conv2.weight, 0.3)
    nn.init.zeros_(block.conv2.bias)


def replace_projection(block):
    torch.manual_seed(2)
    block.downsample = nn.Conv2d(4, 8, 1, 2).double()


def reflect(block):
    """An attribute that the segment reads of a convolution, not the resolution."""
    block.conv2.padding_mode = "reflect"
    block.conv2._reversed_padding_repeated_twice = [1, 1, 1, 1]


def reorder_projection(block):
    """The same children under the same names, in another order."""
    block.downsample._modules = {name: block.downsample._modules[name] for name in ("1", "0")}
    block.downsample[0].running_mean = torch.zeros(4).double()
    block.downsample[0].running_var = torch.ones(4).double()
    block.downsample[0].weight, block.downsample[0].bias = None, None


def dilate(block):
    block.conv2.dilation = block.conv2.padding = (2, 2)


# how to change a block, and the path that it takes then
CHANGES = {
    "norm hook": (lambda block: block.bn1.register_forward_hook(double), "eager"),
    "norm pre hook": (lambda block: block.bn1.register_forward_pre_hook(lambda module, args: (2 * args[0],)), "eager"),
    "hooks replaced": (replace_hooks, "eager"),
    "act patched": (patch_act, "eager"),
    "class replaced": (replace_class, "eager"),
    "child replaced": (replace_conv, "fused"),
    "act replaced": (lambda block: setattr(block, "relu", nn.SiLU()), "fused"),
    "padding mode": (reflect, "fused"),
    "dilation": (dilate, "fused"),
    "frozen norm": (lambda block: block.bn2.eval(), "fused"),
    "projection hook": (lambda block: block.downsample.register_forward_hook(double), "eager"),
    "projection backward hook": (lambda block: block.downsample.register_full_backward_hook(double_gradients), "eager"),
    "projection backward pre hook": (
        lambda block: block.downsample.register_full_backward_pre_hook(double_gradients),
        "eager",
    ),
    "projection norm hook": (lambda block: block.downsample[1].register_forward_hook(double), "eager"),
    "projection grows": (lambda block: block.downsample.append(nn.Tanh()), "fused"),
    "projection reordered": (reorder_projection, "fused"),
    "projection replaced": (replace_projection, "fused"),
    "conv hook": (lambda block: block.conv3.register_forward_hook(double), "fused"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_two_calls_is_seen(change, kernels):
    block, eager = pair(bottleneck)
    for network in (block, eager):
        CHANGES[change][0](network)
    assert_matches_eager(block, eager, sample(), path=CHANGES[change][1])


@pytest.mark.parametrize("change", ["norm hook", "child replaced", "act replaced"])
def test_a_change_in_a_block_of_its_own_is_seen(change, kernels):
    block, eager = pair(own)
    for network in (block, eager):
        CHANGES[change][0](network)
    assert_matches_eager(block, eager, sample(), path=CHANGES[change][1])


@pytest.mark.parametrize(
    "build, change, path",
    [
        (leaky, lambda block: setattr(block.relu, "negative_slope", 0.3), "fused"),
        (gelu, lambda block: setattr(block.relu, "approximate", "tanh"), "fused"),
        (Gated, lambda block: setattr(block, "gamma", nn.Parameter(torch.full((1, 4, 1, 1), 3.0).double())), "fused"),
        (MmdetStyle, lambda block: setattr(block, "norm1_name", "bn2"), "eager"),
        (MmdetStyle, lambda block: setattr(block, "downsample", nn.AvgPool2d(1)), "eager"),
        (Nested, lambda block: block.layers.append(nn.Tanh()), "eager"),
    ],
    ids=["slope", "approximate", "gate", "name", "new child", "longer host"],
)
def test_a_setting_changed_between_two_calls_is_seen(build, change, path, kernels):
    block, eager = pair(build)
    for network in (block, eager):
        change(network)
    assert_matches_eager(block, eager, sample(), path=path)


def test_a_count_of_children_is_watched():
    block = nn.Module()
    block.held = nn.Sequential()
    reader = memo.Reader(block)
    assert reader.count(block.held) == 0
    memo.remember("answer", "key", reader)
    assert memo.recall(block, "key") == "answer"
    block.held.append(nn.ReLU())
    assert memo.recall(block, "key") is None


def test_a_missing_gate_is_eagers_error():
    block, eager = pair(Gated)
    for network in (block, eager):
        del network.gamma
        with pytest.raises(AttributeError, match="gamma"):
            network(sample())


def test_a_block_with_hooks_is_not_remembered(resolved, kernels):
    block = bottleneck().double()
    fusedres.fuse(block)
    handle = block.conv1.register_forward_hook(lambda *arguments: None)
    del resolved[:]
    for _ in range(2):
        block(sample())
    assert len(resolved) == 2
    handle.remove()
    for _ in range(2):
        block(sample())
    assert len(resolved) == 3


@pytest.mark.parametrize("build", [bottleneck, own], ids=["fused", "own"])
def test_nothing_remembered_reaches_a_copy_or_a_file(build):
    block, _ = pair(build)
    for copier in (copy.copy, copy.deepcopy, lambda block: pickle.loads(pickle.dumps(block))):
        block(sample())
        assert memo._ATTRIBUTE in block.__dict__
        assert memo._ATTRIBUTE not in copier(block).__dict__


def test_nothing_remembered_stays_after_unfuse():
    block = bottleneck()
    names = set(block.__dict__)
    fusedres.fuse(block)
    block(sample(dtype=torch.float32))
    assert set(block.__dict__) == {*names, memo._ATTRIBUTE}
    fusedres.unfuse(block)
    assert set(block.__dict__) == names


def test_what_shares_a_blocks_attributes_is_resolved_for_itself(kernels):
    """As the replicas of nn.DataParallel do, which are copies with other children."""
    block, eager = pair(bottleneck)
    replica = block._replicate_for_data_parallel()
    replica._modules.update({name: copy.deepcopy(child) for name, child in block._modules.items()})
    assert memo._ATTRIBUTE in replica.__dict__
    for network in (replica, eager):
        nn.init.constant_(network.conv1.weight, 0.1)
    x = sample()
    assert isinstance(replica, Fused)
    torch.testing.assert_close(replica(x), eager(x))

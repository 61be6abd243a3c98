"""The roofline's counts against those of the operators that really run, and against the ops' own statements."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torchvision_models import torchvision

from fusedres.bench.roofline import Design, layers

SHAPE = (2, 3, 64, 64)
aten = torch.ops.aten


@pytest.fixture(params=["resnet18", "resnet50", "resnext50_32x4d"])
def network(request):
    return torchvision.models.get_model(request.param, weights=None)


def totals(found, *kinds):
    chosen = [layer for layer in found if layer.kind in kinds]
    flops = [sum(getattr(layer.flops, way) for layer in chosen) for way in ("forward", "backward")]
    moved = {design: sum(layer.bytes[design].total for layer in chosen) for design in Design}
    return flops, moved


def on_meta(network, training):
    twin = network.to("meta").train(training)
    return twin, torch.empty(SHAPE, device="meta")


def test_flops_are_those_that_torch_counts(network):
    found = layers(network, SHAPE, training=True, dtype=torch.float32)
    flops, _ = totals(found, "conv", "linear")
    twin, x = on_meta(network, True)
    with FlopCounterMode(display=False) as forward:
        y = twin(x)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert flops[0] == forward.get_total_flops()
    if network.layer1[0].conv2.groups == 1:
        assert flops[1] == backward.get_total_flops()
    else:  # torch counts the weight gradient of a grouped convolution as if it were dense
        assert flops[1] == 2 * flops[0] - found[0].flops.forward


class Moved(TorchDispatchMode):
    """Adds up what the operators of one kind read and write."""

    def __init__(self):
        super().__init__()
        self.norm = self.conv = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        size = [t.numel() * t.itemsize if isinstance(t, torch.Tensor) else 0 for t in args]
        packet = function.overloadpacket
        if packet in (aten.native_batch_norm, aten._native_batch_norm_legit, aten.cudnn_batch_norm):
            training = args[5]
            self.norm += (2 if training else 1) * size[0] + size[0]
        elif packet is aten.native_batch_norm_backward:
            self.norm += 2 * (size[0] + size[1]) + size[1]
        elif packet in (aten.relu, aten.relu_):
            self.norm += 2 * size[0]
        elif packet is aten.threshold_backward or (
            packet in (aten.add, aten.add_) and isinstance(args[1], torch.Tensor) and args[0].dim() == 4
        ):
            self.norm += size[0] + size[1] + size[0]
        elif packet is aten.max_pool2d_with_indices:
            self.norm += size[0] + sum(t.numel() * t.itemsize for t in result)
        elif packet is aten.max_pool2d_with_indices_backward:
            self.norm += size[0] + size[-1] + size[1]
        elif packet is aten.convolution:
            self.conv += min(size[0], self.touched(args[0], args[1], result)) + size[1] + result.numel() * 4
        elif packet is aten.convolution_backward:
            dy, x, weight = args[:3]
            wants_dx = args[10][0]
            self.conv += size[0] + min(size[1], self.touched(x, weight, dy)) + size[2]
            self.conv += (size[0] + size[2] + size[1]) * wants_dx
        return result

    @staticmethod
    def touched(x, weight, y):
        return y.numel() // y.shape[1] * x.shape[1] * weight[0, 0].numel() * 4


@pytest.mark.parametrize("training", [True, False])
def test_bytes_of_eager_are_those_of_its_operators(network, training):
    found = layers(network, SHAPE, training=training, dtype=torch.float32)
    twin, x = on_meta(network, training)
    with Moved() as moved, torch.set_grad_enabled(training):
        y = twin(x)
        if training:
            y.sum().backward()
    assert totals(found, "elementwise")[1][Design.EAGER] == moved.norm
    assert totals(found, "conv")[1][Design.EAGER] == moved.conv


def test_bytes_of_fused_are_those_that_the_ops_state():
    found = layers(torchvision.models.resnet50(), SHAPE, training=True, dtype=torch.bfloat16)
    by_name = {layer.name: layer for layer in found if layer.what != "sum of gradients"}
    assert len(found) == len(by_name) + 16  # one for each block

    def tensors(name):
        layer = by_name[name]
        size = torch.Size(layer.shape).numel() * 2
        return layer.what, *(moved / size for moved in layer.bytes[Design.FUSED])

    assert tensors("layer1.0.bn1") == ("bn+act", 3, 5)
    assert tensors("layer1.1.bn3") == ("bn+add+act", 4, 6)
    assert tensors("layer2.0.bn3") == ("bn+bn+add+act", 5, 8)
    assert "layer1.0.downsample.1" not in by_name


def test_each_design_moves_less_than_the_one_before(network):
    for training in (True, False):
        moved = totals(layers(network, SHAPE, training=training, dtype=torch.float32), "conv", "elementwise")[1]
        assert moved[Design.EAGER] > moved[Design.FUSED] > moved[Design.WHOLE]


def test_a_whole_block_reads_its_input_and_weights_and_writes_its_output():
    found = layers(torchvision.models.resnet18(), SHAPE, training=False, dtype=torch.float32)
    block = [layer for layer in found if layer.name.startswith("layer2.0.")]
    weights = sum(p.numel() for p in torchvision.models.resnet18().layer2[0].parameters() if p.dim() == 4)
    x, y = 2 * 64 * 16 * 16, 2 * 128 * 8 * 8
    assert sum(layer.bytes[Design.WHOLE].total for layer in block) == 4 * (x + weights + y)


def test_the_least_time_is_bound_by_arithmetic_or_by_memory():
    layer = layers(torchvision.models.resnet18(), SHAPE, training=False, dtype=torch.float32)[0]
    moved = layer.bytes[Design.EAGER].forward
    assert layer.seconds(Design.EAGER, layer.flops.forward, 1e30) == 1
    assert layer.seconds(Design.EAGER, 1e30, moved / 2) == 2


def test_norms_outside_of_blocks_count_too():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.Sigmoid())
    found = layers(model, SHAPE, training=True, dtype=torch.float32)
    assert [(layer.name, layer.what) for layer in found] == [("0", "1x1 3 -> 4"), ("1", "bn")]

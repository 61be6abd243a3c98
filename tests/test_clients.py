"""Other people's models as clients: torchvision's and a tutorial's ResNet, and timm's blocks described by hand."""

import copy
from functools import partial

import optional
import pytest
import torch
import torch.nn.functional as F
from eager import assert_matches_eager, assert_path, assert_same_outcome, observe, randomise, sample
from torch import nn

import fusedres
from fusedres import dispatch
from fusedres.residual import Residual, Stage, run
from fusedres.testing import import_torchvision

torchvision = import_torchvision()
timm_layers = optional.package("timm.layers")
timm_resnet = optional.package("timm.models.resnet")

BOTTLENECK = Residual(
    (
        Stage("conv1", "bn1", "act1"),
        Stage("conv2", "bn2", "act2", before_act=("drop_block",), after_act=("aa",)),
        Stage("conv3", "bn3"),
    ),
    shortcut="downsample",
    between=("se", "drop_path"),
    act="act3",
)


class Described(nn.Module):
    """A timm block run by its description; the block's own forward is the eager path."""

    residual = BOTTLENECK

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return run(self.block, self.residual, x, self.block.forward)


class Plain(Described):
    def forward(self, x):
        return self.block(x)


OPTIONS = {
    "plain": {},
    "se": {"attn_layer": "se"},
    "drop path": {"drop_path": timm_layers.DropPath(0.5)},
    "drop path that drops all": {"drop_path": timm_layers.DropPath(1.0)},
    "drop path unscaled": {"drop_path": timm_layers.DropPath(0.5, scale_by_keep=False)},
    "se, drop path": {"attn_layer": "se", "drop_path": timm_layers.DropPath(0.3)},
    "eca": {"attn_layer": "eca"},
    "drop block": {"drop_block": partial(timm_layers.DropBlock2d, drop_prob=0.3, block_size=3)},
    "anti-aliasing": {"aa_layer": timm_layers.BlurPool2d},
    "silu": {"act_layer": nn.SiLU},
    "everything": {
        "attn_layer": "se",
        "drop_path": timm_layers.DropPath(0.3),
        "drop_block": partial(timm_layers.DropBlock2d, drop_prob=0.3, block_size=3),
        "aa_layer": timm_layers.BlurPool2d,
        "act_layer": nn.SiLU,
    },
}


def timm_pair(options, *, stride=2, dtype=torch.float64, training=True, **more):
    downsample = timm_resnet.downsample_avg(6, 16, 1, stride) if stride == 2 else None
    inplanes = 6 if stride == 2 else 16
    arguments = copy.deepcopy(OPTIONS[options]) | more
    block = timm_resnet.Bottleneck(inplanes, 4, stride, downsample, **arguments)
    randomise(block)
    block = block.to(dtype).train(training)
    return Described(block), Plain(copy.deepcopy(block)), sample(4, inplanes, 8, 8, dtype=dtype)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_described_timm_block_equals_its_own_forward(options, stride, training, backend):
    described, plain, x = timm_pair(options, stride=stride, training=training)
    # SE's product and drop-path's are taken together: equal, but not to the last bit.
    assert_matches_eager(described, plain, x, exact=False)


def test_a_timm_block_without_gates_is_exact_on_the_reference():
    for options in ("plain", "drop path", "anti-aliasing", "drop block"):
        assert_matches_eager(*timm_pair(options))


@pytest.mark.parametrize("options", ["se, drop path", "everything"])
def test_a_hook_on_an_attention_module_fires_with_eagers_tensors(options, backend):
    described, plain, x = timm_pair(options)
    seen = [], []
    for client, calls in zip((described, plain), seen, strict=True):
        client.block.se.register_forward_hook(lambda module, args, y, calls=calls: calls.append((args[0], y)))
        client.block.drop_path.register_forward_hook(lambda module, args, y: y * 2)
    assert_matches_eager(described, plain, x, exact=False)
    ((ours,), (theirs,)) = seen
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", ["drop path", "se", "se, drop path"])
@pytest.mark.parametrize("frozen", [False, True])
def test_under_autocast_a_timm_block_has_eagers_dtypes_draws_and_near_values(options, frozen, device, backend):
    more = {"norm_layer": lambda channels, **_: torchvision.ops.FrozenBatchNorm2d(channels)} if frozen else {}
    described, plain, x = timm_pair(options, dtype=torch.float32, **more)
    context = partial(torch.autocast, device, dtype=torch.bfloat16)
    actual, expected = observe(described, x, context=context), observe(plain, x, context=context)
    assert torch.equal(actual.random_state, expected.random_state)
    for name, tensor in expected.tensors.items():
        ours = actual.tensors[name]
        assert ours.dtype == tensor.dtype
        if name == "y":
            assert (ours - tensor).float().norm() <= 2**-6 * tensor.float().norm()


@pytest.mark.parametrize("options", ["se, drop path", "everything"])
def test_a_described_timm_block_compiles_into_one_graph(options, backend):
    described, plain, x = timm_pair(options)
    torch._dynamo.reset()
    compiled = torch.compile(described, fullgraph=True, backend="aot_eager")
    actual = observe(compiled, x, owner=described)
    expected = observe(torch.compile(plain, fullgraph=True, backend="aot_eager"), x, owner=plain)
    assert_same_outcome(actual, expected, exact=False)


class OneStage(nn.Module):
    residual = Residual((Stage("conv", "norm"),), shortcut="downsample", between=("drop_path",), act="act")

    def __init__(self, fused):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), torchvision.ops.FrozenBatchNorm2d(4)
        self.downsample, self.act, self.fused = None, nn.ReLU(inplace=True), fused
        self.drop_path = timm_layers.DropPath(0.3)

    def eager_forward(self, x):
        out = self.drop_path(self.norm(self.conv(x)))
        out += x
        return self.act(out)

    def forward(self, x):
        return run(self, self.residual, x, self.eager_forward) if self.fused else self.eager_forward(x)


def test_a_random_factor_is_drawn_in_the_dtype_that_a_frozen_norm_makes_under_autocast(device, backend):
    fused, eager = OneStage(True), OneStage(False)
    eager.load_state_dict(fused.state_dict())
    context, x = partial(torch.autocast, device, dtype=torch.bfloat16), sample(8, 4, 4, 4, dtype=torch.float32)
    actual, expected = (observe(block, x, context=context).tensors["y"] for block in (fused, eager))
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


class Scaled(nn.Module):
    """A block whose branch is multiplied by an attribute: LayerScale, or the Euler step of a residual ODE."""

    residual = Residual((Stage("conv", "norm"),), shortcut="downsample", gate="gamma", act="act")

    def __init__(self, gamma, fused):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.downsample, self.act, self.gamma, self.fused = None, nn.ReLU(inplace=True), gamma, fused

    def eager_forward(self, x):
        gamma = self.gamma
        if isinstance(gamma, torch.Tensor) and gamma.dim() == 1:
            gamma = gamma.view(1, -1, 1, 1)
        out = gamma * self.norm(self.conv(x))
        out += x
        return self.act(out)

    def forward(self, x):
        return run(self, self.residual, x, self.eager_forward) if self.fused else self.eager_forward(x)


GATES = {
    "LayerScale": lambda: nn.Parameter(torch.tensor([0.1, -0.5, 2.0, 1e-3])),
    "one value": lambda: nn.Parameter(torch.tensor([0.3])),
    "a value without dimensions": lambda: nn.Parameter(torch.tensor(0.3)),
    "Euler step": lambda: 0.1,
    "integer": lambda: 2,
    "frozen tensor": lambda: torch.tensor([0.1, -0.5, 2.0, 1e-3]),
}


def scaled_pair(gate, dtype):
    fused = Scaled(GATES[gate](), True)
    randomise(fused)
    fused = fused.to(dtype)
    if isinstance(fused.gamma, torch.Tensor):
        fused.gamma = nn.Parameter(fused.gamma.to(dtype), requires_grad=fused.gamma.requires_grad)
    eager = copy.deepcopy(fused)
    eager.fused = False
    return fused, eager


@pytest.mark.parametrize("gate", GATES)
def test_a_gate_attribute_multiplies_the_branch(gate, backend):
    assert_matches_eager(*scaled_pair(gate, torch.float64), sample())


@pytest.mark.parametrize("gate", GATES)
def test_a_gate_under_autocast_promotes_as_in_eager_and_loses_no_precision(gate, device, kernels):
    fused, eager = scaled_pair(gate, torch.float32)
    context = partial(torch.autocast, device, dtype=torch.bfloat16)
    x = sample(8, 4, 16, 16, dtype=torch.bfloat16) / 64
    truth = observe(copy.deepcopy(eager).double(), x.double()).tensors["y"]
    with dispatch.recording(fused) as choices:
        actual = observe(fused, x, context=context).tensors["y"]
    assert_path(choices, "fused")
    expected = observe(eager, x, context=context).tensors["y"]
    assert actual.dtype == expected.dtype
    assert (actual - truth).norm() <= 1.05 * (expected - truth).norm()


class TutorialResNet(nn.Module):
    """The ResNet for CIFAR as tutorials write it."""

    def __init__(self, block, num_blocks, num_classes=10):
        super().__init__()
        self.in_planes = 8
        self.conv1 = nn.Conv2d(3, 8, kernel_size=3, stride=1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.layer1 = self._make_layer(block, 8, num_blocks[0], stride=1)
        self.layer2 = self._make_layer(block, 16, num_blocks[1], stride=2)
        self.linear = nn.Linear(16 * block.expansion, num_classes)

    def _make_layer(self, block, planes, num_blocks, stride):
        layers = []
        for index in range(num_blocks):
            layers.append(block(self.in_planes, planes, stride if index == 0 else 1))
            self.in_planes = planes * block.expansion
        return nn.Sequential(*layers)

    def forward(self, x):
        out = self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x)))))
        return self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))


class TutorialBasicBlock(nn.Module):
    expansion = 1

    def __init__(self, in_planes, planes, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, kernel_size=3, stride=1, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_planes, planes, kernel_size=1, stride=stride, bias=False), nn.BatchNorm2d(planes)
            )

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


@pytest.mark.parametrize("training", [True, False])
def test_a_tutorials_resnet_takes_the_block_and_its_checkpoints(training, backend):
    eager = TutorialResNet(TutorialBasicBlock, [2, 2])
    randomise(eager)
    fused = TutorialResNet(fusedres.BasicBlock, [2, 2])
    fused.load_state_dict(eager.state_dict(), strict=True)
    eager.load_state_dict(fused.state_dict(), strict=True)
    assert TutorialResNet(fusedres.Bottleneck, [1, 1]).double()(sample(2, 3, 8, 8)).shape == (2, 10)
    assert_matches_eager(
        fused.double().train(training), eager.double().train(training), sample(2, 3, 8, 8), exact=backend == "reference"
    )


@pytest.mark.parametrize("name", ["BasicBlock", "Bottleneck"])
def test_torchvisions_resnet_takes_the_block(name, backend):
    torchvision_resnet = torchvision.models.resnet
    torch.manual_seed(0)
    eager = torchvision_resnet.ResNet(getattr(torchvision_resnet, name), [1, 1, 1, 1], num_classes=3).double()
    torch.manual_seed(0)
    fused = torchvision_resnet.ResNet(getattr(fusedres, name), [1, 1, 1, 1], num_classes=3).double()
    assert_matches_eager(fused, eager, sample(4, 3, 48, 48))
    eager.load_state_dict(fused.state_dict(), strict=True)

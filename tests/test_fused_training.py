"""Training goes on after fuse as it would have: steps, mixed precision, averages, conversions, processes, compilers."""

import copy
from collections import Counter
from pathlib import Path

import hugging_face
import optional
import pytest
import torch
import torch.multiprocessing as processes
import torch.nn.functional as F
from eager import assert_matches_eager, randomise
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torchvision_models import resnet
from user_blocks import Cifar

import fusedres
from fusedres import dispatch
from fusedres.swap import Fused


def network(dtype=torch.float32):
    torch.manual_seed(3)
    stem = (nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    down = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
    blocks = resnet.BasicBlock(8, 8), resnet.Bottleneck(8, 4, 2, down)
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3)).to(dtype)


def pair(dtype=torch.float64):
    eager = network(dtype)
    randomise(eager)
    fused = copy.deepcopy(eager)
    assert len(fusedres.fuse(fused, strict=True).fused) == 3
    return fused, eager


def images(dtype=torch.float64, count=4):
    """Three classes: noise brighter in one of the channels."""
    labels = torch.arange(count) % 3
    x = torch.randn(count, 3, 16, 16, dtype=dtype)
    return x + 0.5 * F.one_hot(labels, 3)[:, :, None, None], labels


def train(model, *, steps, autocast=False, order=None, dtype=torch.float32, seed=0):
    """The losses of some steps of SGD; `order` permutes the batch, which permutes the sums of every statistic."""
    torch.manual_seed(seed)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    scaler = torch.amp.GradScaler("cpu", enabled=autocast)
    losses = []
    for _ in range(steps):
        x, labels = images(dtype, 12)
        if order is not None:
            x, labels = x[order], labels[order]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(model(x), labels)
        optimiser.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_fifty_steps_stay_within_eagers_own_spread(autocast, backend):
    eager = train(network(), steps=50, autocast=autocast)
    model = network()
    fusedres.fuse(model)
    fused = train(model, steps=50, autocast=autocast)
    spread = max(
        (train(network(), steps=50, autocast=autocast, order=order) - eager).abs().max()
        for order in (torch.arange(11, -1, -1), torch.arange(12).roll(5))
    )
    assert (fused - eager).abs().max() <= 2 * spread, f"{(fused - eager).abs().max()} over {spread}"
    assert fused[-5:].mean() < 0.5 * fused[:5].mean()


def test_fifty_steps_in_double_precision_are_the_same(kernels):
    model = network(torch.float64)
    fusedres.fuse(model)
    fused = train(model, steps=50, dtype=torch.float64)
    other = network(torch.float64)
    torch.testing.assert_close(fused, train(other, steps=50, dtype=torch.float64), rtol=0, atol=1e-8)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name], rtol=1e-7, atol=1e-7)


@pytest.mark.slow
def test_accuracy_converges_as_eagers_does():
    def accuracy(fuse, seed):
        model = network()
        if fuse:
            fusedres.fuse(model)
        train(model, steps=150, seed=seed)
        torch.manual_seed(1000 + seed)
        x, labels = images(torch.float32, 600)
        return (model.eval()(x).argmax(1) == labels).double().mean().item()

    eager, fused = ([accuracy(fuse, seed) for seed in range(3)] for fuse in (False, True))
    assert sum(fused) / 3 >= sum(eager) / 3 - 0.02, (fused, eager)
    assert min(fused) > 0.9


def test_fuse_in_the_middle_of_training():
    model, eager = network(torch.float64), network(torch.float64)
    losses = []
    for network_, fuse in ((model, True), (eager, False)):
        first = train(network_, steps=3, dtype=torch.float64)
        if fuse:
            fusedres.fuse(network_)
        losses.append(torch.cat([first, train(network_, steps=3, dtype=torch.float64, seed=1)]))
    torch.testing.assert_close(*losses, rtol=0, atol=1e-10)


# name: how to build it, its residual blocks and runs
FAMILIES = {
    "torchvision basic": (lambda: resnet.resnet18(), 8),
    "torchvision bottleneck": (lambda: resnet.resnet50(), 16),
    "torchvision ResNeXt": (lambda: resnet.resnext50_32x4d(), 16),
    "torchvision wide": (lambda: resnet.wide_resnet50_2(), 16),
    "timm with deep stem": (lambda: optional.package("timm").create_model("resnet26d"), 10),
    "Hugging Face": (hugging_face.classifier, 5),
}


def functions_of_a_step(model):
    """How many of each kind of function autograd has of a forward of a small batch, the model fused."""
    model.train().to(memory_format=torch.channels_last)
    fusedres.fuse(model)
    with dispatch.any_size():
        y = model(torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last))
    waiting, found = [getattr(y, "logits", y).grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [before for before, _ in node.next_functions]
    return Counter(type(node).__name__ for node in found)


NOT_FUSED = {"NativeBatchNormBackward0", "AddBackward0", "MulBackward0"}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_block_of_a_known_family_trains_as_one_function(name, native):
    build, blocks = FAMILIES[name]
    kinds = functions_of_a_step(build())
    assert kinds["SegmentFunctionBackward"] == blocks
    assert not (NOT_FUSED | {"BnActBackward", "ReluBackward0"}) & kinds.keys()


@pytest.mark.parametrize("name, blocks, projections", [("seresnet18", 8, 3), ("seresnet50", 16, 4)])
def test_a_block_with_squeeze_and_excite_is_a_segment_to_its_last_convolution(name, blocks, projections, native):
    kinds = functions_of_a_step(optional.package("timm").create_model(name))
    assert kinds["SegmentFunctionBackward"] == blocks
    assert kinds["ConvolutionFunctionBackward"] == blocks + projections
    # SE reads the last norm's result, which is therefore one function, and what joins the shortcut is another.
    assert kinds["BnActBackward"] == blocks + projections
    assert kinds["AffineActBackward"] == blocks - projections
    assert not NOT_FUSED & kinds.keys()


def test_an_average_of_the_weights_is_fused_and_follows():
    timm_utils = optional.package("timm.utils")
    model, eager = network(torch.float64), network(torch.float64)
    fusedres.fuse(model)
    averages = []
    for network_ in (model, eager):
        average = timm_utils.ModelEmaV2(network_, decay=0.5)
        train(network_, steps=2, dtype=torch.float64)
        average.update(network_)
        averages.append(average.module)
    assert isinstance(averages[0][3], Fused)
    for mine, theirs in zip(averages[0].state_dict().values(), averages[1].state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("first", ["fuse", "convert"])
def test_sync_batch_norm_conversion(first, kernels):
    model = network(torch.float64)
    eager = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    if first == "fuse":
        fusedres.fuse(model)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if first == "convert":
        assert len(fusedres.fuse(model, strict=True).fused) == 3
    assert isinstance(model[3].bn1, nn.SyncBatchNorm) and isinstance(model[3], Fused)
    x, _ = images()
    # torch's SyncBatchNorm takes no CPU tensor in training
    assert_matches_eager(model.eval(), eager.eval(), x)


def test_activation_checkpointing(kernels):
    fused, eager = pair()
    x, labels = images()
    for model in (fused, eager):
        out = checkpoint(model[:5] if model is eager else nn.Sequential(*model[:5]), x, use_reentrant=False)
        F.cross_entropy(model[5:](out), labels).backward()
    for mine, theirs in zip(fused.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-10)


@pytest.mark.parametrize("first", ["fuse", "compile"])
def test_torch_compile(first, kernels):
    eager = network(torch.float64)
    randomise(eager)
    model = copy.deepcopy(eager)
    x, _ = images()
    if first == "fuse":
        fusedres.fuse(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    if first == "compile":
        compiled.eval()(x)
        assert len(fusedres.fuse(compiled, strict=True).fused) == 3
    torch.testing.assert_close(compiled.eval()(x), eager.eval()(x))
    compiled.train()(x).square().sum().backward()
    eager.train()(x).square().sum().backward()
    for mine, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-7, atol=1e-9)
    for mine, theirs in zip(model.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)


def replica(rank, folder):
    """One of two processes: half of each batch, gradients averaged by DDP."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    for fused in (False, True):
        torch.save(replica_states(rank, fused), f"{folder}/state-{fused}-{rank}")
    torch.distributed.destroy_process_group()


def replica_states(rank, fused):
    model = network(torch.float64)
    if fused:
        assert len(fusedres.fuse(model, strict=True).fused) == 3
    model = DistributedDataParallel(model)
    assert not fused or len(fusedres.fuse(model).already_fused) == 3
    torch.manual_seed(rank)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        x, labels = images()
        optimiser.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimiser.step()
    return model.module.state_dict()


def test_two_processes_train_alike(tmp_path):
    processes.spawn(replica, (str(tmp_path),), nprocs=2)
    for rank in (0, 1):
        mine, theirs = (torch.load(Path(tmp_path) / f"state-{fused}-{rank}") for fused in (True, False))
        for name, tensor in theirs.items():
            torch.testing.assert_close(mine[name], tensor, msg=lambda text, name=name: f"{name}: {text}")


def test_tracers_see_eagers_operations():
    fused, eager = pair()
    graphs = [torch.fx.symbolic_trace(model.eval()).graph for model in (fused, eager)]
    assert [str(node.target) for node in graphs[0].nodes] == [str(node.target) for node in graphs[1].nodes]
    x, _ = images()
    exported = [torch.export.export(model, (x,)).graph for model in (fused, eager)]
    assert [node.target for node in exported[0].nodes] == [node.target for node in exported[1].nodes]


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_torchscript_compiles_the_original_forward():
    fused, eager = pair()
    x, _ = images()
    classes = [type(module) for module in fused.modules()]
    for convert in (torch.jit.script, lambda model: torch.jit.trace(model, x)):
        torch.testing.assert_close(convert(fused.eval())(x), eager.eval()(x))
    assert [type(module) for module in fused.modules()] == classes
    block = Cifar().double().eval()  # calls functions of its own file
    expected = block(x := torch.randn(2, 4, 6, 6, dtype=torch.float64))
    fusedres.fuse(block)
    torch.testing.assert_close(torch.jit.script(block)(x), expected)


def test_disabled_runs_the_original_forward(monkeypatch):
    fused, eager = pair()
    monkeypatch.setattr(dispatch, "disabled", True)
    x, _ = images()
    assert_matches_eager(fused, eager, x, path="eager")


def test_feature_extractors_of_a_fused_network_see_the_same():
    from torchvision.models.feature_extraction import create_feature_extractor

    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    traced = resnet.resnet18(num_classes=3).double().eval()
    listed = optional.package("timm").create_model("resnet10t", features_only=True).double().eval()

    def features():
        return create_feature_extractor(traced, ["layer1", "layer3.0.relu"])(x), listed(x)

    before = features()
    for model in (traced, listed):
        assert fusedres.fuse(model, strict=True).fused
    torch.testing.assert_close(features(), before)

"""fuse swaps a block's forward and nothing else, unfuse takes it back, copies stay fused, files don't know of it."""

import copy
import io
import json
import pickle
import threading
import time

import pytest
import torch
from eager import assert_matches_eager, assert_path, randomise, sample
from torch import nn
from torch.nn.utils.parametrize import register_parametrization
from user_blocks import Cifar, ConvNormAct, Nested, PreActivation

import fusedres
from fusedres import dispatch
from fusedres.report import Code
from fusedres.swap import Fused
from fusedres.testing import import_torchvision

resnet = import_torchvision().models.resnet


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.layer1 = nn.Sequential(Cifar(4, 4), Cifar(4, 6, 2))
        self.layer2 = nn.Sequential(Cifar(6, 6), PreActivation(6, 6))

    def forward(self, x):
        return self.layer2(self.layer1(self.stem(x)))


def paths(rows):
    return [row.path for row in rows]


def pair():
    model = Net().double()
    randomise(model)
    return model, copy.deepcopy(model)


def test_the_same_objects_stay_in_place():
    model, _ = pair()
    modules = dict(model.named_modules())
    tensors = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    inside = {name: dict(module.__dict__) for name, module in modules.items()}
    text = str(model)
    fusedres.fuse(model)
    assert dict(model.named_modules()) == modules
    assert {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()} == tensors
    assert {name: module.__dict__ for name, module in modules.items()} == inside
    assert isinstance(model.layer1[0], Cifar) and isinstance(model.stem, nn.Sequential)
    assert str(model) == text


def test_unfuse_restores_exactly_and_fuse_is_stable():
    model, _ = pair()
    classes = [type(module) for module in model.modules()]
    first = fusedres.fuse(model)
    fused_classes = [type(module) for module in model.modules()]
    assert fused_classes != classes
    fusedres.unfuse(model)
    assert [type(module) for module in model.modules()] == classes
    assert fusedres.fuse(model) == first
    assert [type(module) for module in model.modules()] == fused_classes


def test_fusing_twice_says_so_and_changes_nothing():
    model, _ = pair()
    first = fusedres.fuse(model)
    classes = [type(module) for module in model.modules()]
    second = fusedres.fuse(model)
    assert not second.fused and paths(second.already_fused) == paths(first.fused)
    assert second.skipped == first.skipped
    assert [type(module) for module in model.modules()] == classes
    assert "already fused" in str(second)


def test_fusedres_own_blocks_count_as_fused():
    report = fusedres.fuse(nn.Sequential(fusedres.BasicBlock(4, 4)))
    assert paths(report.already_fused) == ["0"] and not report.skipped


def test_a_fused_network_matches_eager(backend):
    model, eager = pair()
    fusedres.fuse(model)
    for training in (True, False):
        assert_matches_eager(model.train(training), eager.train(training), sample(2, 3, 8, 8))


def test_the_report_names_every_block():
    report = fusedres.fuse(Net())
    assert paths(report.fused) == ["stem", "layer1.0", "layer1.1", "layer2.0"]
    assert [(row.path, row.code) for row in report.skipped] == [("layer2.1", Code.UNPROVEN)]
    table = str(report).splitlines()
    assert len(table) == 7 and table[-1] == "4 fused, 1 skipped"
    rows = json.loads(report.to_json())
    assert rows[4]["path"] == "layer2.1" and rows[4]["code"] == "unproven" and rows[4]["reason"]
    assert str(fusedres.fuse(nn.Linear(2, 2))) == "no residual block found"


@pytest.mark.parametrize(
    "selection, expected",
    [
        ({"only": "layer1.*"}, ["layer1.0", "layer1.1"]),
        ({"only": "layer1"}, ["layer1.0", "layer1.1"]),
        ({"only": ["stem", "layer2.0"]}, ["stem", "layer2.0"]),
        ({"only": Cifar}, ["layer1.0", "layer1.1", "layer2.0"]),
        ({"skip": "layer1.1"}, ["stem", "layer1.0", "layer2.0"]),
        ({"skip": (Cifar, "stem")}, []),
        ({"only": "layer1", "skip": "*.0"}, ["layer1.1"]),
    ],
)
def test_selection(selection, expected):
    assert paths(fusedres.fuse(Net(), **selection).fused) == expected


def test_a_selection_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"only='layr1\.\*' matches no module"):
        fusedres.fuse(Net(), only="layr1.*")
    with pytest.raises(TypeError, match="skip takes paths and module classes, got 3"):
        fusedres.fuse(Net(), skip=[3])


def test_strict_raises_and_changes_nothing():
    model = Net()
    with pytest.raises(RuntimeError, match=r"1 blocks can't be fused[\s\S]*layer2\.1: unproven"):
        fusedres.fuse(model, strict=True)
    assert not any(isinstance(module, Fused) for module in model.modules())
    assert fusedres.fuse(model, strict=True, skip=PreActivation).fused
    fusedres.fuse(model, strict=True, skip=PreActivation)  # again: what is fused is not skipped


@pytest.mark.parametrize("bad", [None, "resnet50", torch.ones(2), Net])
def test_what_is_no_module_is_refused(bad):
    for function in (fusedres.fuse, fusedres.unfuse):
        with pytest.raises(TypeError, match=r"takes an nn\.Module, got"):
            function(bad)


def test_an_exported_program_is_refused():
    exported = torch.export.export(Cifar().eval(), (torch.randn(1, 4, 4, 4),))
    with pytest.raises(TypeError, match="fuse the model before exporting it"):
        fusedres.fuse(exported)
    assert [row.code for row in fusedres.fuse(exported.module()).skipped] == [Code.SCRIPTED]


def test_copies_stay_fused():
    model, eager = pair()
    fusedres.fuse(model)
    twin = copy.deepcopy(model)
    assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]
    assert twin.layer1[0].conv1.weight is not model.layer1[0].conv1.weight
    assert_matches_eager(twin, eager, sample(2, 3, 6, 6))
    shallow = copy.copy(model.layer1[0])
    assert type(shallow) is type(model.layer1[0]) and shallow.conv1 is model.layer1[0].conv1


def test_a_copy_that_fails_leaves_the_block_fused():
    model, _ = pair()
    fusedres.fuse(model)
    block = model.layer1[0]
    block.lock = threading.Lock()
    with pytest.raises(TypeError, match="pickle"):
        copy.deepcopy(block)
    assert isinstance(block, Fused)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_holds_the_original_class(protocol):
    block = resnet.BasicBlock(4, 4)
    fusedres.fuse(block)
    block.register_forward_hook(torch.nn.functional.relu)
    data = pickle.dumps(block, protocol)
    assert b"fusedres" not in data
    loaded = pickle.loads(data)
    assert type(loaded) is resnet.BasicBlock and len(loaded._forward_hooks) == 1
    assert str(loaded) == str(block) and isinstance(block, Fused)


def test_a_file_loads_where_fusedres_is_not_installed(run_python, tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), Cifar(4, 6, 2)).eval()
    randomise(model)
    fusedres.fuse(model)
    x = torch.randn(2, 3, 6, 6)
    torch.save(model, tmp_path / "model.pt")
    torch.save((x, model(x).detach()), tmp_path / "data.pt")
    run_python(
        f"""
import sys
sys.modules["fusedres"] = None
import torch
model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
x, y = torch.load({str(tmp_path / "data.pt")!r})
torch.testing.assert_close(model(x), y)
"""
    )


def test_a_state_dict_goes_both_ways():
    model, eager = pair()
    fusedres.fuse(model)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    eager.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    model.load_state_dict(eager.state_dict(), strict=True)


def test_hooks_on_a_block_and_set_later_fire(kernels):
    model, eager = pair()
    before, inside = [], []
    model.layer1[0].register_forward_hook(lambda *arguments: before.append(1))
    fusedres.fuse(model)
    with dispatch.recording(model) as choices:
        model.eval()(sample(2, 3, 6, 6))
    assert before == [1] and "layer1.0" not in {c.block for c in choices if c.backend == "eager path"}
    model.layer1[0].bn1.register_forward_hook(lambda *arguments: inside.append(1))
    assert_matches_eager(model.train(), eager, sample(2, 3, 6, 6), path="eager")
    assert inside == [1]


def test_references_held_elsewhere_stay_valid():
    model, eager = pair()
    block, weight = model.layer1[0], model.layer1[0].conv1.weight
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    fusedres.fuse(model)
    assert model.layer1[0] is block and optimiser.param_groups[0]["params"][4] is weight
    for network in (model, eager):
        network(sample(2, 3, 6, 6) * 0 + 1).sum().backward()
    before = weight.detach().clone()
    optimiser.step()
    assert not torch.equal(weight, before)


def test_arguments_by_name_and_too_many_reach_the_original_forward():
    block = Cifar().double()
    fusedres.fuse(block)
    x = sample()
    torch.testing.assert_close(block.eval()(x=x), block(x))
    with pytest.raises(TypeError, match="positional argument"):
        block(x, x)

    class Optional(Cifar):
        def forward(self, x, scale=1):
            out = super().forward(x)
            return out if scale == 1 else out * scale

    block = Optional().double().eval()
    assert fusedres.fuse(block).fused
    torch.testing.assert_close(block(x, scale=2), 2 * block(x))


def test_a_sequential_that_changes_runs_its_own_forward(kernels):
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).double()
    fusedres.fuse(model)
    for change in (lambda m: m.append(nn.Tanh()), lambda m: m.pop(1), lambda m: m.insert(0, nn.Tanh())):
        change(model)
        eager = copy.deepcopy(model)
        fusedres.unfuse(eager)
        x = sample()
        assert torch.equal(model(x), eager(x))
    assert torch.equal(model[:1](x), model[0](x))


def test_fuse_on_resnet152_takes_less_than_a_second():
    model = resnet.resnet152()
    started = time.perf_counter()
    report = fusedres.fuse(model)
    assert time.perf_counter() - started < 1
    assert len(report.fused) == 51


def test_nested_blocks_are_fused_as_a_whole():
    model = nn.Sequential(Nested(), ConvNormAct(4, 4))
    report = fusedres.fuse(model)
    assert paths(report.fused) == ["0", "1"]
    assert not isinstance(model[0].layers[0], Fused)


def test_parametrized_later_is_seen(kernels):
    model, eager = pair()
    fusedres.fuse(model)

    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    for network in (model, eager):
        register_parametrization(network.layer1[0].bn1, "weight", Double())
    assert_matches_eager(model, eager, sample(2, 3, 6, 6), path="eager")


def test_explain_sees_fused_blocks():
    model = Net()
    fusedres.fuse(model)
    choices = fusedres.explain(model, torch.randn(2, 3, 6, 6)).choices
    assert {choice.block for choice in choices} == {"stem", "layer1.0", "layer1.1", "layer2.0"}
    assert_path(list(choices), "fused")

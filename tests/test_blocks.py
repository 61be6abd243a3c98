"""BasicBlock and Bottleneck beside torchvision's: the same values, signature, keys and checkpoints."""

import copy
from functools import partial

import pytest
import torch
from eager import assert_matches_eager, observe, randomise, sample
from torch import nn

import fusedres
from fusedres import dispatch
from fusedres.testing import import_torchvision

resnet = import_torchvision().models.resnet

CLASSES = {
    "BasicBlock": (fusedres.BasicBlock, resnet.BasicBlock),
    "Bottleneck": (fusedres.Bottleneck, resnet.Bottleneck),
}


def projection(inplanes, outplanes, stride):
    return nn.Sequential(nn.Conv2d(inplanes, outplanes, 1, stride, bias=False), nn.BatchNorm2d(outplanes))


def beside_torchvision(name, *args, downsample=None, **kwargs):
    """Our block and torchvision's, in fp64, with one state."""
    ours, theirs = CLASSES[name]
    eager = theirs(*args, downsample=downsample, **kwargs)
    randomise(eager)
    fused = ours(*args, downsample=copy.deepcopy(downsample), **kwargs)
    fused.load_state_dict(eager.state_dict())
    return fused.double(), eager.double()


CASES = {
    "basic, identity": ("BasicBlock", 4, 4),
    "basic, projection": ("BasicBlock", 4, 6, 2, projection(4, 6, 2)),
    "basic, projection without stride": ("BasicBlock", 4, 6, 1, projection(4, 6, 1)),
    "bottleneck, identity": ("Bottleneck", 8, 2),
    "bottleneck, projection": ("Bottleneck", 6, 2, 2, projection(6, 8, 2)),
    "bottleneck, groups": ("Bottleneck", 8, 2, 1, None, 2),
    "bottleneck, groups and width": ("Bottleneck", 8, 2, 1, None, 2, 96),
    "bottleneck, wide": ("Bottleneck", 8, 2, 1, None, 1, 128),
    "bottleneck, dilation": ("Bottleneck", 8, 2, 1, None, 1, 64, 2),
    "bottleneck, stride and dilation": ("Bottleneck", 8, 2, 2, projection(8, 8, 2), 2, 64, 3),
    "bottleneck, norm layer": (
        "Bottleneck",
        8,
        2,
        1,
        None,
        1,
        64,
        1,
        partial(nn.BatchNorm2d, eps=1e-3, momentum=0.3),
    ),
}


def built(case):
    name, *args = CASES[case]
    downsample = copy.deepcopy(args[3]) if len(args) > 3 else None
    names = ("inplanes", "planes", "stride", "downsample", "groups", "base_width", "dilation", "norm_layer")
    kwargs = dict(zip(names, args, strict=False)) | {"downsample": downsample}
    return beside_torchvision(name, **kwargs)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_values_gradients_and_statistics_are_torchvisions(case, training, backend):
    fused, eager = built(case)
    x = sample(3, fused.conv1.in_channels, 6, 6)
    for _ in range(2):
        assert_matches_eager(fused.train(training), eager.train(training), x)


@pytest.mark.parametrize("case", CASES)
def test_the_eager_path_is_torchvisions_forward(case, monkeypatch):
    monkeypatch.setattr(dispatch, "disabled", True)
    fused, eager = built(case)
    assert_matches_eager(fused, eager, sample(3, fused.conv1.in_channels, 6, 6), path="eager")


@pytest.mark.parametrize("training", [True, False])
def test_without_gradients_values_and_statistics_are_torchvisions(training, backend):
    for case in ("basic, projection", "bottleneck, identity"):
        fused, eager = built(case)
        x = sample(3, fused.conv1.in_channels, 6, 6)
        for context in (torch.no_grad, torch.inference_mode):
            assert_matches_eager(fused.train(training), eager.train(training), x, backward=False, context=context)


@pytest.mark.parametrize("case", CASES)
def test_a_torchvision_signature_builds_the_same_block_by_position(case):
    name, *args = CASES[case]
    ours, theirs = CLASSES[name]
    fused, eager = ours(*args), theirs(*args)
    shapes = {key: tensor.shape for key, tensor in eager.state_dict().items()}
    assert {key: tensor.shape for key, tensor in fused.state_dict().items()} == shapes
    assert list(fused.state_dict()) == list(eager.state_dict())
    for conv, original in zip(fused.modules(), eager.modules(), strict=True):
        assert type(conv) is type(original) or original is eager
        assert conv is fused or conv.extra_repr() == original.extra_repr()


@pytest.mark.parametrize("name", CLASSES)
def test_a_block_is_initialised_as_torchvisions_from_the_same_seed(name):
    ours, theirs = CLASSES[name]
    torch.manual_seed(5)
    expected = theirs(8, 8 // theirs.expansion).state_dict()
    torch.manual_seed(5)
    actual = ours(8, 8 // ours.expansion).state_dict()
    assert all(torch.equal(actual[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize("name", CLASSES)
def test_expansion_and_stride_are_torchvisions(name):
    ours, theirs = CLASSES[name]
    assert ours.expansion == theirs.expansion
    assert ours(4, 4, 2).stride == 2


@pytest.mark.parametrize("name", CLASSES)
def test_the_short_forms_build_their_own_projection(name):
    block = CLASSES[name][0]
    forms = [
        block(4, 6, 2),
        block(4, 6, stride=2),
        block(in_planes=4, planes=6, stride=2),
        block(inplanes=4, planes=6, stride=2),
        block(in_channels=4, out_channels=6, stride=2),
        block(4, out_channels=6, stride=2),
    ]
    for form in forms:
        assert form.downsample is None
        assert [type(child) for child in form.shortcut] == [nn.Conv2d, nn.BatchNorm2d]
        assert form.shortcut[0].stride == (2, 2)
        assert form(sample(2, 4, 6, 6, dtype=torch.float32)).shape == (2, 6 * block.expansion, 3, 3)


@pytest.mark.parametrize("name", CLASSES)
def test_a_projection_is_built_only_where_the_shapes_ask_for_one(name):
    block = CLASSES[name][0]
    planes = 8 // block.expansion
    assert block(8, planes).shortcut is None
    assert block(8, planes, 2).shortcut is not None
    assert block(8, planes + 1).shortcut is not None
    given = nn.Identity()
    assert block(8, planes, 2, given).downsample is given
    assert block(8, planes, 2, given).shortcut is None


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(
    "wrong, message",
    [
        ({}, "pass exactly one of inplanes, in_planes, in_channels; got none"),
        ({"inplanes": 4}, "pass exactly one of planes, out_channels; got none"),
        (
            {"inplanes": 4, "in_planes": 4, "planes": 4},
            "exactly one of inplanes, in_planes, in_channels; got inplanes, in_p",
        ),
        (
            {"inplanes": 4, "planes": 4, "out_channels": 4},
            "exactly one of planes, out_channels; got planes, out_channels",
        ),
        ({"inplanes": 4, "planes": 4, "strides": 2}, "unexpected keyword argument 'strides'"),
    ],
)
def test_a_wrong_or_missing_name_is_a_type_error_that_says_which(name, wrong, message):
    with pytest.raises(TypeError, match=message):
        CLASSES[name][0](**wrong)


@pytest.mark.parametrize("name", CLASSES)
def test_self_built_and_given_projections_compute_the_same(name, backend):
    own = CLASSES[name][0](4, 6, 2)
    randomise(own)
    given = CLASSES[name][0](4, 6, 2, copy.deepcopy(own.shortcut))
    given.load_state_dict(own.state_dict())
    x = sample()
    actual, expected = observe(own.double(), x).tensors, observe(given.double(), x).tensors
    assert all(torch.equal(t, expected[key.replace("shortcut", "downsample")]) for key, t in actual.items())


def keys_renamed(state, old, new):
    return {key.replace(old, new): tensor for key, tensor in state.items()}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("prefix", ["", "layer1.0."])
def test_shortcut_and_downsample_load_from_each_others_keys(name, prefix):
    ours, theirs = CLASSES[name]
    eager = theirs(4, 6, 2, projection(4, 6 * theirs.expansion, 2))
    randomise(eager)
    downsampled = {prefix + key: tensor for key, tensor in eager.state_dict().items()}
    shortcuts = keys_renamed(downsampled, "downsample", "shortcut")
    for block in (ours(4, 6, 2), ours(4, 6, 2, projection(4, 6 * ours.expansion, 2))):
        model = nn.ModuleDict({"layer1": nn.Sequential(block)}) if prefix else block
        for state in (downsampled, shortcuts):
            for tensor in model.state_dict().values():
                tensor.zero_()
            before = dict(state)
            model.load_state_dict(state, strict=True)
            assert state == before
            own = keys_renamed(model.state_dict(), "downsample", "shortcut")
            assert all(torch.equal(own[key], tensor) for key, tensor in shortcuts.items())
    theirs(4, 6, 2, projection(4, 6 * theirs.expansion, 2)).load_state_dict(
        keys_renamed(ours(4, 6, 2).state_dict(), "shortcut", "downsample"), strict=True
    )


@pytest.mark.parametrize("name", CLASSES)
def test_a_strict_load_still_names_what_is_missing_or_unexpected(name):
    block = CLASSES[name][0](4, 6, 2)
    state = block.state_dict()
    del state["shortcut.0.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*shortcut\.0\.weight"):
        block.load_state_dict(state)
    identity = CLASSES[name][0](8, 8 // block.expansion)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*shortcut\.0\.weight"):
        identity.load_state_dict(identity.state_dict() | {"shortcut.0.weight": torch.zeros(1)})


@pytest.mark.parametrize("name", CLASSES)
def test_zero_init_residual_makes_the_block_start_as_its_shortcut(name, backend):
    block = CLASSES[name][0](8, 8 // CLASSES[name][0].expansion, zero_init_residual=True).double()
    x = sample(2, 8, 4, 4)
    assert torch.equal(block(x), x.relu())
    default = CLASSES[name][0](8, 8 // block.expansion)
    last = default.get_submodule(default.residual.stages[-1].norm)
    assert torch.equal(last.weight, torch.ones(8))
    CLASSES[name][0](8, 4, norm_layer=partial(nn.BatchNorm2d, affine=False), zero_init_residual=True)


class Padded(nn.Module):
    """The parameterless projection of the first ResNet paper."""

    def forward(self, x):
        return nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1))


DOWNSAMPLES = {
    "average pool, conv, norm": lambda: nn.Sequential(nn.AvgPool2d(2), *projection(4, 6, 1)),
    "conv, norm, dropout": lambda: nn.Sequential(*projection(4, 6, 2), nn.Dropout(0.5)),
    "nested": lambda: nn.Sequential(nn.AvgPool2d(2), projection(4, 6, 1)),
    "norm with bias conv": lambda: nn.Sequential(nn.Conv2d(4, 6, 1, 2), nn.BatchNorm2d(6)),
    "frozen weights": lambda: projection(4, 6, 2).requires_grad_(False),
    "norm in eval mode": lambda: projection(4, 6, 2),
    "only a conv": lambda: nn.Sequential(nn.Conv2d(4, 6, 1, 2)),
    "only a norm": lambda: nn.Sequential(nn.Conv2d(4, 6, 1, 2), nn.Identity()),
    "a bare conv": lambda: nn.Conv2d(4, 6, 3, 2, 1),
    "any module": Padded,
    "group norm": lambda: nn.Sequential(nn.Conv2d(4, 6, 1, 2), nn.GroupNorm(2, 6)),
    "Identity": nn.Identity,
    "empty Sequential": nn.Sequential,
    "Sequential of a norm": lambda: nn.Sequential(nn.BatchNorm2d(4)),
}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("form", DOWNSAMPLES)
def test_every_form_of_downsample_is_taken(form, name, backend):
    if form in ("Identity", "empty Sequential", "Sequential of a norm"):
        ours, theirs, arguments = *CLASSES[name], (4, 4 // CLASSES[name][0].expansion, 1)
    else:
        # A width of 6 out of either block: 6 planes, or a Bottleneck whose expansion is 1.
        ours, theirs = (type(cls.__name__, (cls,), {"expansion": 1}) for cls in CLASSES[name])
        arguments = (4, 6, 2)
    eager = theirs(*arguments, DOWNSAMPLES[form]())
    randomise(eager)
    fused = ours(*arguments, copy.deepcopy(eager.downsample))
    fused.load_state_dict(eager.state_dict(), strict=True)
    for block in (fused, eager):
        if form == "norm in eval mode":
            block.downsample[1].eval()
    assert_matches_eager(fused.double(), eager.double(), sample())
    assert_matches_eager(fused.eval(), eager.eval(), sample())

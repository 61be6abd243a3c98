"""The drop-in contract at call time: what is noticed takes the eager path, and everything equals eager."""

import warnings

import pytest
import torch
from eager import (
    assert_matches_eager,
    assert_same_error,
    identity_pair,
    observe,
    pair,
    projection_pair,
    sample,
)
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune


class Doubled(nn.Module):
    def forward(self, t):
        return 2 * t


class LoudBatchNorm2d(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


class Tagged(torch.Tensor):
    pass


def weight_norm_of_old(module):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*weight_norm.*is deprecated", category=FutureWarning)
        nn.utils.weight_norm(module, dim=None)


def with_plain(*names):
    """As libraries of meta-learning do it: what the convolution had as parameters are attributes."""

    def replace(block):
        block.conv2 = nn.Conv2d(6, 6, 3, padding=1).double()
        for name in names:
            value = getattr(block.conv2, name).detach() * 2
            delattr(block.conv2, name)
            setattr(block.conv2, name, value)

    return replace


REPLACED = {
    "relu by LeakyReLU(0.3)": ("fused", lambda b: setattr(b, "relu", nn.LeakyReLU(0.3))),
    "relu by LeakyReLU": ("fused", lambda b: setattr(b, "relu", nn.LeakyReLU(inplace=True))),
    "relu by ReLU6": ("fused", lambda b: setattr(b, "relu", nn.ReLU6(inplace=True))),
    "relu by PReLU": ("fused", lambda b: setattr(b, "relu", nn.PReLU(dtype=torch.float64))),
    "relu by SiLU": ("fused", lambda b: setattr(b, "relu", nn.SiLU(inplace=True))),
    "relu by GELU": ("fused", lambda b: setattr(b, "relu", nn.GELU())),
    "relu by tanh GELU": ("fused", lambda b: setattr(b, "relu", nn.GELU("tanh"))),
    "relu by Hardswish": ("fused", lambda b: setattr(b, "relu", nn.Hardswish())),
    "relu by Identity": ("fused", lambda b: setattr(b, "relu", nn.Identity())),
    "conv2's parameters by plain tensors": ("fused", with_plain("weight", "bias")),
    "conv2's bias by a plain tensor": ("fused", with_plain("bias")),
    "conv1 by one that reflects": (
        "fused",
        lambda b: setattr(b, "conv1", nn.Conv2d(4, 6, 3, 2, 1, bias=False, padding_mode="reflect").double()),
    ),
    "conv2 by one with its padding in words": (
        "fused",
        lambda b: setattr(b, "conv2", nn.Conv2d(6, 6, 3, padding="same").double()),
    ),
    "conv1 by a Sequential": ("fused", lambda b: setattr(b, "conv1", nn.Sequential(b.conv1, Doubled()))),
    "bn1 by GroupNorm": ("eager", lambda b: setattr(b, "bn1", nn.GroupNorm(2, 6, dtype=torch.float64))),
    "bn1 by Identity": ("eager", lambda b: setattr(b, "bn1", nn.Identity())),
    "bn2 by InstanceNorm2d": (
        "eager",
        lambda b: setattr(b, "bn2", nn.InstanceNorm2d(6, affine=True).double()),
    ),
    "bn2 by a subclass": ("eager", lambda b: setattr(b, "bn2", LoudBatchNorm2d(6).double())),
    "bn2 by a Sequential": ("eager", lambda b: setattr(b, "bn2", nn.Sequential(b.bn2, Doubled()))),
    "the projection's norm": ("fused", lambda b: b.shortcut.__setitem__(1, nn.GroupNorm(2, 6).double())),
    "the projection by a module": ("fused", lambda b: setattr(b, "shortcut", nn.Conv2d(4, 6, 2, 2).double())),
    "the projection by two norms": ("fused", lambda b: b.shortcut.append(nn.BatchNorm2d(6).double())),
    "the projection by an activation after it": ("fused", lambda b: b.shortcut.append(nn.ReLU(inplace=True))),
}


@pytest.mark.parametrize("change", REPLACED)
def test_a_replaced_child_is_the_one_that_runs(change, backend):
    path, replace = REPLACED[change]
    fused, eager = projection_pair()
    for block in (fused, eager):
        torch.manual_seed(3)
        replace(block)
    assert_matches_eager(fused, eager, sample(), path=path)


PATCHED = {
    "conv1": "fused",
    "bn1": "eager",
    "relu": "eager",
    "bn2": "eager",
    "shortcut": "eager",
    "shortcut.1": "eager",
}


@pytest.mark.parametrize("path", PATCHED)
def test_a_patched_forward_of_a_child_is_called(path, backend):
    fused, eager = projection_pair()
    for block in (fused, eager):
        child = block.get_submodule(path)
        child.forward = lambda t, original=child.forward: 3 * original(t)
    assert_matches_eager(fused, eager, sample(), path=PATCHED[path])


REPARAMETRISED = {
    "parametrised norm": (
        "eager",
        lambda b: parametrize.register_parametrization(b.bn1, "weight", Doubled()),
    ),
    "parametrised conv": (
        "fused",
        lambda b: parametrize.register_parametrization(b.conv1, "weight", Doubled()),
    ),
    "weight_norm of a conv": ("fused", lambda b: parametrizations.weight_norm(b.conv2)),
    "spectral_norm of a conv": ("fused", lambda b: parametrizations.spectral_norm(b.conv1)),
    "weight_norm by hooks of a conv": ("fused", lambda b: weight_norm_of_old(b.conv1)),
    "weight_norm by hooks of a norm": ("eager", lambda b: weight_norm_of_old(b.bn1)),
    "pruned norm": ("eager", lambda b: prune.l1_unstructured(b.bn2, "weight", amount=0.5)),
    "pruned conv": ("fused", lambda b: prune.l1_unstructured(b.conv2, "weight", amount=0.5)),
    "parametrised projection norm": (
        "fused",
        lambda b: parametrize.register_parametrization(b.shortcut[1], "weight", Doubled()),
    ),
}


@pytest.mark.parametrize("change", REPARAMETRISED)
def test_a_reparametrised_child_computes_as_in_eager(change, backend):
    path, reparametrise = REPARAMETRISED[change]
    fused, eager = projection_pair()
    for block in (fused, eager):
        torch.manual_seed(3)
        reparametrise(block)
    assert_matches_eager(fused, eager, sample(), path=path)


@pytest.mark.parametrize("stage", ["bn1", "shortcut.1"])
def test_a_changed_hyperparameter_of_a_norm_is_noticed_by_the_next_call(stage, backend):
    fused, eager = projection_pair()
    x = sample()
    assert_matches_eager(fused, eager, x)
    for block in (fused, eager):
        norm = block.get_submodule(stage)
        norm.momentum, norm.eps = 0.7, 0.5
    assert_matches_eager(fused, eager, x)


def test_a_projection_set_after_construction_is_the_one_that_runs(backend):
    for name in ("downsample", "shortcut"):
        fused, eager = identity_pair()
        for block in (fused, eager):
            torch.manual_seed(3)
            setattr(block, name, nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).double())
        assert_matches_eager(fused, eager, sample())


@pytest.mark.parametrize("build", [identity_pair, projection_pair])
def test_a_tensor_subclass_comes_out_as_from_eager(build, backend):
    fused, eager = build()
    x = sample().as_subclass(Tagged)
    assert_matches_eager(fused, eager, x, path="eager")
    assert type(fused(x)) is Tagged


@pytest.mark.parametrize("owner", ["conv1", "bn1", "bn2", "shortcut.1"])
def test_a_subclassed_parameter_makes_the_output_that_class_as_in_eager(owner, backend):
    fused, eager = projection_pair()
    for block in (fused, eager):
        child = block.get_submodule(owner)
        child.weight = nn.Parameter(child.weight.detach().as_subclass(Tagged))
    actual, expected = fused(sample()), eager(sample())
    assert type(actual) is type(expected)


@pytest.mark.parametrize("training", [True, False])
def test_a_broadcasting_shortcut_is_added_as_in_eager(training, backend):
    fused, eager = identity_pair()
    for block in (fused, eager):
        block.downsample = nn.AdaptiveAvgPool2d(1)
        block.train(training)
    assert_matches_eager(fused, eager, sample())


def test_a_shortcut_of_fewer_dimensions_is_added_as_in_eager(backend):
    fused, eager = identity_pair()
    for block in (fused, eager):
        block.downsample = nn.Sequential(nn.AdaptiveAvgPool2d((1, 6)), nn.Flatten(0, 2))[:1]
    assert_matches_eager(fused, eager, sample())


def test_a_shortcut_that_does_not_fit_raises_as_eager(backend):
    fused, eager = identity_pair()
    for block in (fused, eager):
        block.downsample = nn.Conv2d(4, 5, 1).double()
    assert_same_error(fused, eager, sample())


BAD_INPUTS = {
    "without a batch": lambda: sample(4, 6, 6),
    "with a third spatial dimension": lambda: sample(2, 4, 3, 6, 6),
    "without pixels": lambda: sample(2, 4),
    "with other channels": lambda: sample(2, 5, 6, 6),
    "of another dtype": lambda: sample(2, 4, 6, 6, dtype=torch.float32),
    "of integers": lambda: torch.ones(2, 4, 6, 6, dtype=torch.long),
    "of one value per channel": lambda: sample(1, 4, 1, 1),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
@pytest.mark.parametrize("build", [identity_pair, projection_pair])
def test_an_input_that_eager_refuses_is_refused_in_its_words(case, build, backend):
    fused, eager = build()
    assert_same_error(fused, eager, BAD_INPUTS[case]())


def test_one_value_per_channel_is_fine_in_eval_mode(backend):
    fused, eager = projection_pair()
    assert_matches_eager(fused.eval(), eager.eval(), sample(1, 4, 1, 1))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("build", [identity_pair, projection_pair])
def test_an_empty_batch_gives_what_eager_gives(build, training, backend):
    fused, eager = build()
    actual = observe(fused.train(training), sample(0, 4, 6, 6))
    expected = observe(eager.train(training), sample(0, 4, 6, 6))
    assert actual.tensors["y"].shape == expected.tensors["y"].shape
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(actual.tensors[name], tensor, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_come_out_where_eager_has_them(value, training, backend):
    fused, eager = identity_pair()
    x = sample()
    x[0, 1, 2, 3] = value
    assert_matches_eager(fused.train(training), eager.train(training), x)
    if value != value:
        assert fused(x).isnan().any()


LAYOUTS = {
    "contiguous": lambda: sample(3, 4, 6, 6),
    "channels_last": lambda: sample(3, 4, 6, 6).to(memory_format=torch.channels_last),
    "sliced pixels": lambda: sample(3, 4, 12, 7)[:, :, ::2, 1:],
    "sliced channels": lambda: sample(3, 8, 6, 6)[:, ::2],
    "sliced channels of channels_last": lambda: sample(3, 6, 6, 8).permute(0, 3, 1, 2)[:, :4],
    "dense-permuted": lambda: sample(6, 3, 4, 6).permute(1, 2, 0, 3),
    "expanded over the batch": lambda: sample(1, 4, 6, 6).expand(3, 4, 6, 6),
    "one channel in channels_last": lambda: sample(3, 6, 6, 4).permute(0, 3, 1, 2),
    "one pixel": lambda: sample(3, 4, 1, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["BasicBlock", "Bottleneck"])
@pytest.mark.parametrize("training", [True, False])
def test_the_output_has_eagers_strides(layout, name, training, backend):
    for arguments in ((4, 4), (4, 2, 2)):
        if name == "Bottleneck" and arguments == (4, 4):
            arguments = (4, 1)
        fused, eager = pair(name, *arguments)
        assert_matches_eager(fused.train(training), eager.train(training), LAYOUTS[layout]())


def test_channels_last_stays_channels_last(backend):
    fused, _ = projection_pair()
    y = fused.to(memory_format=torch.channels_last)(sample().to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert not y.is_contiguous()


def test_the_output_may_be_changed_in_place_as_eagers_may(backend):
    fused, eager = identity_pair()
    for block in (fused, eager):
        block.register_forward_hook(lambda module, args, y: y.mul_(2) if not torch.is_grad_enabled() else y * 2)
    assert_matches_eager(fused, eager, sample())
    with torch.no_grad():
        assert_matches_eager(fused, eager, sample(), backward=False)

"""fusedres.models beside torchvision's: keys, shapes, initial weights, options, values."""

import pytest
import torch
from eager import assert_matches_eager, sample
from torch import nn

import fusedres
from fusedres.testing import import_torchvision

torchvision = import_torchvision()
NAMES = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "wide_resnet50_2"]


def both(name, **options):
    """Our model and torchvision's, built from one seed."""
    models = []
    for source in (fusedres.models, torchvision.models):
        torch.manual_seed(0)
        models.append(getattr(source, name)(**options))
    return models


@pytest.mark.parametrize("name", NAMES)
def test_keys_shapes_and_children_are_torchvisions(name):
    with torch.device("meta"):
        ours, theirs = both(name)
    expected = [(key, t.shape, t.dtype) for key, t in theirs.state_dict().items()]
    assert [(key, t.shape, t.dtype) for key, t in ours.state_dict().items()] == expected
    children = [(path, module.extra_repr()) for path, module in theirs.named_modules()]
    assert [(path, module.extra_repr()) for path, module in ours.named_modules()] == children


@pytest.mark.parametrize("name", NAMES)
def test_every_model_runs_on_the_meta_device(name):
    with torch.device("meta"):
        assert getattr(fusedres.models, name)(num_classes=7).eval()(torch.empty(2, 3, 64, 64)).shape == (2, 7)


@pytest.mark.parametrize(
    "name, options",
    [
        ("resnet18", {}),
        ("resnet50", {}),
        ("resnet18", {"zero_init_residual": True}),
        ("resnet50", {"zero_init_residual": True, "num_classes": 5}),
    ],
)
def test_initial_weights_are_torchvisions_from_the_same_seed(name, options):
    ours, theirs = both(name, **options)
    expected = theirs.state_dict()
    for key, tensor in ours.state_dict().items():
        assert torch.equal(tensor, expected[key]), key


@pytest.mark.parametrize(
    "options",
    [
        {"replace_stride_with_dilation": [False, True, True]},
        {"replace_stride_with_dilation": [True, False, True]},
        {"norm_layer": lambda channels: nn.GroupNorm(8, channels)},
        {"num_classes": 3},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_are_torchvisions(options):
    ours, theirs = both("resnet50", **options)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_training_step_is_torchvisions(name, backend):
    ours, theirs = both(name, num_classes=4)
    x = sample(4, 3, 64, 64, dtype=torch.float32)
    if backend == "reference":
        assert_matches_eager(ours, theirs, x)
        return
    # In fp64 the two differ by rounding alone, which 50 layers of batch norm carry a few digits further.
    x = x.double()
    actual, expected = ours.double()(x), theirs.double()(x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11 * expected.abs().max().item())
    actual.square().sum().backward()
    expected.square().sum().backward()
    for (key, parameter), original in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        bar = 1e-9 * max(original.grad.abs().max().item(), 1.0)
        torch.testing.assert_close(
            parameter.grad, original.grad, rtol=0, atol=bar, msg=lambda m, key=key: f"{key}: {m}"
        )


def test_checkpoints_load_strictly_both_ways():
    ours, theirs = both("resnet18")
    with torch.no_grad():
        for tensor in theirs.state_dict().values():
            tensor.fill_(2)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert all((tensor == 2).all() for tensor in ours.state_dict().values())
    theirs.load_state_dict(ours.state_dict(), strict=True)


def test_a_checkpoint_of_shortcut_keys_loads_into_a_model():
    with torch.no_grad():
        model = fusedres.models.cifar_resnet18()
        state = {key.replace("downsample", "shortcut"): torch.full_like(t, 3) for key, t in model.state_dict().items()}
        model.load_state_dict(state, strict=True)
        assert all((tensor == 3).all() for tensor in model.state_dict().values())


def test_the_cifar_model_keeps_32_pixels_through_its_stem(backend):
    model = fusedres.models.cifar_resnet18()
    seen = []
    model.layer1.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert seen == [(2, 64, 32, 32)]
    assert model.conv1.kernel_size == (3, 3)
    assert sum(t.numel() for t in model.parameters()) == 11_173_962


def test_an_unknown_stem_is_an_error_that_lists_the_choices():
    with pytest.raises(ValueError, match="stem must be 'imagenet' or 'cifar', got 'mnist'"):
        fusedres.models.resnet18(stem="mnist")


def test_zero_init_residual_starts_every_block_as_its_shortcut():
    model = fusedres.models.cifar_resnet18(zero_init_residual=True)
    blocks = [module for module in model.modules() if isinstance(module, fusedres.BasicBlock)]
    assert len(blocks) == 8
    assert not any(block.bn2.weight.any() for block in blocks)
    assert all(block.bn1.weight.all() for block in blocks)


def test_hooks_on_the_stem_fire_as_in_torchvision(backend):
    counts = []
    for model in both("resnet18", num_classes=2):
        calls = []
        for module in (model.conv1, model.bn1, model.relu, model.maxpool, model.layer1[0].relu):
            module.register_forward_hook(lambda module, args, y, calls=calls: calls.append(type(module).__name__))
        model(torch.randn(2, 3, 32, 32))
        counts.append(calls)
    assert counts[0] == counts[1]

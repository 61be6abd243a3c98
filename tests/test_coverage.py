"""Whole networks of torchvision and timm: fused where they can be, equal to themselves unfused in any case."""

import fnmatch
import math
from functools import cache, partial

import optional
import pytest
import torch
from eager import randomise
from torchvision_models import torchvision

import fusedres
from fusedres.bench.work import settle
from fusedres.report import Code

timm = optional.package("timm")

TORCHVISION = fnmatch.filter(torchvision.models.list_models(torchvision.models), "*resne[tx]*")
TIMM = [
    name
    for pattern in ("resnet*", "resnext*", "seresnet*", "wide_resnet*", "ecaresnet*", "gcresnet*")
    for name in timm.list_models(pattern)
]
SAMPLE = {
    "torchvision": ("resnet18", "resnext50_32x4d"),
    "timm": (
        "resnet10t",
        "resnet26d",
        "resnetblur18",
        "seresnet18",
        "ecaresnet26t",
        "resnetv2_18",
        "gcresnet33ts",
        "regnety_002",
    ),
}
OTHERS = ("regnetx_002", "regnety_002", "gernet_s", "darknet53")  # proven by their forwards
NAMES = [("torchvision", name) for name in TORCHVISION] + [("timm", name) for name in (*TIMM, *OTHERS)]
LARGE, HUGE = 120_000_000, 250_000_000  # parameters: in eval mode alone; and in fp32, for memory's sake


def networks():
    """Every name; those not in the sample are slow."""
    for library, name in NAMES:
        marks = () if name in SAMPLE[library] else pytest.mark.slow
        yield pytest.param(library, name, id=f"{library}-{name}", marks=marks)


def build(library, name):
    torch.manual_seed(0)
    if library == "torchvision":
        return torchvision.models.get_model(name, weights=None, num_classes=3)
    return timm.create_model(name, num_classes=3)


def step(model, x, training):
    """The output, the gradients and the buffers of one forward and backward; the buffers are put back."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    torch.manual_seed(1)
    y = model.train(training)(x)
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(y.square().sum(), list(parameters.values()), allow_unused=True)
    found = {"y": y.detach(), **dict(zip(parameters, gradients, strict=True))}
    for name, buffer in model.named_buffers():
        found[name] = buffer.clone()
        buffer.copy_(before[name])
    return found


def differs(fused, eager):
    """In fp64, with room for how much a deep network amplifies a rounding."""
    if eager is None or not eager.is_floating_point():
        return not (fused is eager or torch.equal(fused, eager))
    scale = eager.abs().max().item() + 1e-6
    bar = 1e-8 if eager.dtype == torch.float64 else 1e-2
    return (fused - eager).abs().max().item() > bar * scale


def assert_same(found, expected, yardstick):
    """Equal, or where a network amplifies roundings beyond any bar, not much farther from a yardstick than eager is."""
    names = [name for name, tensor in expected.items() if differs(found[name], tensor)]
    ratios = []
    for name in names:
        ours, eagers = ((t[name] - yardstick()[name]).norm().item() for t in (found, expected))
        ratios.append(math.log((ours + 1e-300) / (eagers + 1e-300)))
    assert not ratios or math.exp(sum(ratios) / len(ratios)) <= 4, names


def yardstick_of(model, x, training):
    """The step in fp64 for one in fp32; for one in fp64, at an input that is another by some roundings."""
    nudged = x * (1 + 8 * torch.finfo(x.dtype).eps) if x.dtype == torch.float64 else x.double()
    return step(model.double(), nudged, training)


@pytest.mark.parametrize("library, name", list(networks()))
def test_a_network_is_fused_or_skipped_and_equal_to_itself(library, name):
    model = build(library, name)
    report = fusedres.fuse(model)
    assert report.rows, "no block was recognised"
    assert all(row.reason for row in report.skipped)
    if library == "torchvision" or type(model).__module__ == "timm.models.resnet":
        assert {row.code for row in report.skipped} <= ({Code.NORM} if name.endswith("_gn") else set()), str(report)
    if not report.fused:
        return
    randomise(model)
    settle(model)  # or roundings grow from block to block, until there is nothing to compare
    size = sum(parameter.numel() for parameter in model.parameters())
    dtype, modes = torch.float64 if size < HUGE else torch.float32, (True, False) if size < LARGE else (False,)
    model, x = model.to(dtype), torch.randn(2, 3, 64, 64, dtype=dtype)
    fused = [step(model, x, training) for training in modes]
    fusedres.unfuse(model)
    for training, found in zip(modes, fused, strict=True):
        expected = step(model, x, training)
        assert_same(found, expected, cache(partial(yardstick_of, model, x, training)))


def test_the_sample_is_of_these_networks():
    assert {(library, name) for library, names in SAMPLE.items() for name in names} <= set(NAMES)

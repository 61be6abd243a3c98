"""optimize(model): what is folded, what is written in place, the report, and bad input."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial

import optional
import pytest
import torch
import torch.nn.functional as F
import user_blocks
from optimized import assert_as_accurate, assert_close, batch, errors, exactly, hold, make, optimized, outputs
from torch import Tensor, nn
from torchvision_models import FrozenBatchNorm2d, resnet

import fusedres
from fusedres import dispatch, families
from fusedres.backends import Geometry
from fusedres.inference.flatten import flatten
from fusedres.inference.steps import Convolve, Mode, Plain, Step, arrange
from fusedres.residual import Residual, Stage
from fusedres.swap import Optimized


def block_of(norm: Callable[[int], nn.Module], **settings: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        down = nn.Sequential(nn.Conv2d(4, 6, 1, 2, bias=False), norm(6))
        block = resnet.BasicBlock(4, 6, 2, down, norm_layer=norm)
        for name, value in settings.items():
            setattr(block.conv2, name, value)
        return block

    return build


def padded(mode: str) -> Callable[[], nn.Module]:
    return block_of(nn.BatchNorm2d, padding_mode=mode, _reversed_padding_repeated_twice=[1, 1, 1, 1])


BLOCKS = {
    "no weights": block_of(lambda c: nn.BatchNorm2d(c, affine=False)),
    "no running statistics": block_of(lambda c: nn.BatchNorm2d(c, track_running_stats=False)),
    "frozen": block_of(FrozenBatchNorm2d),
    "synchronised": block_of(nn.SyncBatchNorm),
    "reflecting": padded("reflect"),
    "same padding": block_of(nn.BatchNorm2d, padding="same"),
    "group norm": block_of(lambda c: nn.GroupNorm(2, c)),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_norms_and_paddings_that_fold_and_that_do_not(name: str) -> None:
    model = make(BLOCKS[name]).double()
    ours, _ = optimized(model)
    x = batch(8, 4, torch.float64)
    torch.testing.assert_close(outputs(ours, x), outputs(model, x), rtol=1e-12, atol=1e-12)


def test_frozen_norms_under_autocast_promote_as_eager_does() -> None:
    model = make(BLOCKS["frozen"])
    ours, _ = optimized(model)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = outputs(ours, batch(8, 4)), outputs(model, batch(8, 4))
    assert y.dtype == expected.dtype


@pytest.mark.parametrize("x_order", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_output_has_the_layout_that_eager_gives(
    order: torch.memory_format, x_order: torch.memory_format, dtype: torch.dtype
) -> None:
    model = make(BLOCKS["no weights"]).to(dtype).to(memory_format=order)  # pyright: ignore[reportCallIssue]
    ours, _ = optimized(model)
    x = batch(8, 4, dtype).contiguous(memory_format=x_order)
    assert outputs(ours, x).stride() == outputs(model, x).stride()


class Keeps(nn.Module):
    """Remembers what it was given."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_nothing_that_another_holds_is_written_to(dtype: torch.dtype) -> None:
    block = make(lambda: resnet.BasicBlock(4, 4)).to(dtype)
    model = nn.Sequential(nn.Conv2d(4, 4, 1), Keeps(), block).eval().to(dtype)
    report = fusedres.optimize(model)
    assert not any(line.in_place for line in report.lines)
    x = batch(6, 4, dtype).contiguous(memory_format=torch.channels_last)
    outputs(model, x)
    torch.testing.assert_close(model[1].seen, outputs(model[0], x))
    alone, report = optimized(block)
    before = x.clone()
    outputs(alone, x)
    assert torch.equal(x, before) and not any(line.in_place for line in report.lines)


def test_a_residual_of_the_plans_own_is_written_in_place() -> None:
    model = make(lambda: nn.Sequential(nn.Conv2d(4, 4, 1), resnet.BasicBlock(4, 4)))
    flat = flatten(model, Mode(torch.device("cpu"), torch.float32, False, None))
    assert [step.in_place for step in flat.steps] == [False, False, True]
    assert [step.frees for step in flat.steps] == [(0,), (), (1, 2)]


def test_only_the_last_reader_of_what_nobody_else_saw_may_write() -> None:
    conv, pool = nn.Conv2d(4, 4, 1), nn.MaxPool2d(1)
    convolve, seen = Convolve(conv, Geometry()), Plain(nn.ReLU())

    def in_place(*steps: tuple[Convolve | Plain, int, int | None]) -> list[bool]:
        arranged = arrange([Step(*step, index + 1) for index, step in enumerate(steps)], len(steps))
        return [step.in_place for step in arranged]

    made = (convolve, 0, None), (convolve, 1, None)
    assert in_place(*made, (convolve, 2, 1)) == [False, False, True]
    assert in_place(*made, (convolve, 2, 1), (convolve, 3, 1))[2] is False, "it is read again"
    assert in_place(*made, (convolve, 2, 2))[2] is False, "it is what is convolved"
    assert in_place(*made, (convolve, 2, 0))[2] is False, "it is the module's input"
    assert in_place(made[0], (seen, 1, None), (convolve, 2, 1))[2] is False, "a module has seen it"
    assert in_place(made[0], (Plain(pool), 1, None), (convolve, 1, 2))[2] is True


class OneConvolution(nn.Module):
    """What is convolved is added."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)) + x)


def test_a_block_of_one_convolution_does_not_write_into_what_it_reads() -> None:
    model = make(lambda: nn.Sequential(nn.Conv2d(4, 4, 1), OneConvolution(), OneConvolution()))
    ours, report = optimized(model)
    assert len(report.convolutions) == 3
    x = batch(6, 4)
    assert_close(outputs(ours, x), model, x)


@pytest.mark.parametrize("block", [user_blocks.Cifar, user_blocks.Tutorial, user_blocks.Gated, user_blocks.ReZero])
@pytest.mark.parametrize("alone", [True, False])
def test_under_autocast_a_block_promotes_as_eager_does(alone: bool, block: Callable[[], nn.Module]) -> None:
    """Alone its identity is fp32 where the branch is bf16; LayerScale's factors always are."""
    seen = []
    for seed in range(5):
        torch.manual_seed(seed)
        model = make(block if alone else lambda: nn.Sequential(nn.Conv2d(4, 4, 1), block()))
        ours, _ = optimized(model)
        with torch.autocast("cpu", torch.bfloat16):
            seen.append(errors(ours, model, batch(16, 4)))
    assert_as_accurate(seen)


def test_autocast_casts_no_fp64_input() -> None:
    model = make(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    ours, _ = optimized(model)
    for module in (model, ours):
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError):
            outputs(module, batch(8, dtype=torch.float64))


def test_a_convolution_of_another_dtype_gets_eagers_error() -> None:
    model = make(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3).double()))
    ours, _ = optimized(model)
    with pytest.raises(RuntimeError) as theirs:
        outputs(model, batch(8))
    with pytest.raises(RuntimeError) as found:
        outputs(ours, batch(8))
    assert str(found.value) == str(theirs.value)


class Broadcasts(nn.Module):
    """The shortcut has one pixel, and the sum's shape is the branch's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)) + self.pool(x))


def test_a_shortcut_that_broadcasts_does_so_as_in_eager() -> None:
    model = make(Broadcasts)
    ours, report = optimized(model)
    assert report.convolutions[-1].step == "conv+norm+add+relu"
    for x in (batch(6, 4), batch(1, 4)):
        assert_close(outputs(ours, x), model, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_16_bits_a_shortcut_broadcasts_as_accurately(dtype: torch.dtype) -> None:
    seen = []
    for seed in range(5):
        torch.manual_seed(seed)
        model = make(Broadcasts).to(dtype)
        ours, _ = optimized(model)
        seen.append(errors(ours, model, batch(16, 4, dtype)))
    assert_as_accurate(seen)


def test_one_plan_serves_every_batch_and_size() -> None:
    model = make(lambda: resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=7))
    ours, _ = optimized(model)
    for shape in ((2, 3, 32, 32), (1, 3, 40, 24), (5, 3, 33, 47), (0, 3, 32, 32), (2, 3, 32, 32)):
        x = torch.randn(shape)
        assert_close(outputs(ours, x), model, x)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("block", [resnet.BasicBlock, resnet.Bottleneck])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_network_gives_the_same_bits_whatever_the_threads(dtype: torch.dtype, block: type[nn.Module]) -> None:
    model = make(lambda: resnet.ResNet(block, [1, 1, 1, 1], num_classes=7)).to(dtype)
    ours, report = optimized(model.to(memory_format=torch.channels_last))
    assert {line.backend for line in report.convolutions} == {"native"}
    x, threads = batch(64, dtype=dtype).contiguous(memory_format=torch.channels_last), torch.get_num_threads()
    expected = outputs(ours, x)
    try:
        for count in (2, 3):
            torch.set_num_threads(count)
            for planned in (ours, optimized(model)[0]):
                assert torch.equal(outputs(planned, x), expected), count
    finally:
        torch.set_num_threads(threads)


@pytest.mark.usefixtures("native")
def test_the_report_tells_every_step() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.SiLU(),
        resnet.BasicBlock(4, 4),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.AdaptiveAvgPool2d(1),
    ).eval()
    report = fusedres.optimize(model)
    lines = [(line.step, line.backend, line.in_place, line.reason) for line in report.lines]
    assert lines == [
        ("0+1+silu", "native", False, None),
        ("3.conv1+bn1+relu", "native", False, None),
        ("3.conv2+bn2+add+relu", "native", True, None),
        ("4", "plain", False, "it pads in mode 'circular'"),
        ("5", "plain", False, None),
    ]
    assert str(report).splitlines()[-1] == "3 convolutions, 2 plain steps"
    assert "(model)  plain    4: it pads in mode 'circular'" in str(report)
    assert json.loads(report.to_json())[2]["in_place"] is True


def test_where_the_whole_is_no_chain_its_parts_are_optimized() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
            self.left, self.right = resnet.BasicBlock(4, 4), user_blocks.Tutorial(4, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.stem(x)
            return self.left(x), self.right(x)

    model = make(Branches)
    twin, report = optimized(model)
    found = {name for name, module in twin.named_modules() if isinstance(module, Optimized)}
    assert found == {"stem", "left", "right"}
    (root,) = report.plain
    assert (root.module, root.step) == ("", "as it is") and root.reason is not None
    x = batch(6)
    for found, theirs, exact in zip(outputs(twin, x), outputs(model, x), exactly(model, x), strict=True):
        hold(found, theirs, exact)


def test_a_model_without_convolutions_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 3)).eval()
    assert str(fusedres.optimize(model)) == "no convolution found that can be optimized"
    assert type(model) is nn.Sequential


@pytest.mark.usefixtures("native")
def test_explain_names_the_backend_of_each_convolution() -> None:
    model = make(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1)))
    fusedres.optimize(model)
    with torch.no_grad():
        choices = fusedres.explain(model, batch(6)).choices
    assert [(choice.op, choice.backend) for choice in choices] == [("conv_act", "native")] * 2
    (refused,) = fusedres.explain(model, batch(6)).choices
    assert "gradients are enabled" in refused.objections["fused"]


def test_a_forced_backend_computes_every_convolution_or_raises() -> None:
    model = make(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    ours, _ = optimized(model)
    x = batch(6)
    with fusedres.use_backend("reference"):
        assert torch.equal(outputs(ours, x), outputs(model, x))
    with fusedres.use_backend("cuda"), pytest.raises(dispatch.Unserved, match="it has no conv_act"):
        outputs(ours, x)


class Scaled(nn.Module):
    """Its branch is multiplied by one factor for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.scale = nn.Parameter(torch.linspace(-1, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) * self.scale.view(1, -1, 1, 1) + x


def with_attention() -> nn.Module:
    resnet = optional.package("timm.models.resnet")
    return resnet.BasicBlock(4, 4, attn_layer="se")


BESIDE_CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "attention": with_attention,
    "gate of channels": Scaled,
    "gate of one value": user_blocks.ReZero,
    "gate of four dimensions": user_blocks.Gated,
    "norm": lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.Sigmoid()),
    "broadcast": Broadcasts,
    "norm of the batch": lambda: resnet.BasicBlock(4, 4, norm_layer=partial(nn.BatchNorm2d, track_running_stats=False)),
    "promotion": lambda: nn.Sequential(nn.BatchNorm2d(4), resnet.BasicBlock(4, 4)),
}


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("name", BESIDE_CONVOLUTIONS)
def test_a_backend_of_convolutions_alone_leaves_the_rest_to_eagers_operators(
    name: str, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))
    residual = Residual((Stage("conv", "norm"),), shortcut="", gate="scale", adds_in_place=False)
    fusedres.register_family(Scaled, "scaled")(lambda block: residual)
    model = make(lambda: nn.Sequential(BESIDE_CONVOLUTIONS[name](), nn.Conv2d(4, 4, 1)))
    ours, _ = optimized(model)
    x = batch(8, 4)
    half = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    with fusedres.use_backend("onednn"), half, dispatch.recording(ours) as choices:
        found, eagers = errors(ours, model, x)
    assert {(choice.op, choice.backend) for choice in choices} == {("conv_act", "onednn")}
    assert found <= 2 * eagers + 4 * torch.finfo(torch.float32).eps


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="takes a model in eval mode, and this one is in training"):
        fusedres.optimize(nn.Conv2d(3, 3, 1))
    nowhere = nn.Sequential(nn.Conv2d(3, 3, 1)).eval().to("meta")
    with pytest.raises(ValueError, match="the parameters are on meta; move the model to a device that computes"):
        fusedres.optimize(nowhere)
    assert type(nowhere) is nn.Sequential
    for function in (fusedres.optimize, fusedres.unoptimize):
        with pytest.raises(TypeError, match=r"takes an nn\.Module, got str"):
            function("resnet50")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(2, 5, 8, 8),
        torch.randn(2, 3, 8, 8).double(),
        torch.randn(3),
        torch.randn(2, 3, 1, 1),
        torch.randn(2, 3, 8, 8, device="meta"),
    ],
)
def test_a_wrong_input_gets_eagers_error_and_changes_nothing(x: Tensor) -> None:
    model = make(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.ReLU()))
    ours, _ = optimized(model)
    right = batch(8)
    expected = outputs(ours, right)
    with pytest.raises(RuntimeError) as theirs:
        outputs(model, x)
    with pytest.raises(RuntimeError) as found:
        outputs(ours, x)
    assert str(found.value) == str(theirs.value)
    assert torch.equal(outputs(ours, right), expected)
    plain = copy.deepcopy(model)
    with pytest.raises(RuntimeError):
        fusedres.optimize(plain, example=x)
    assert not any(isinstance(module, Optimized) for module in plain.modules())

"""A block as one autograd function: when it is one, what it computes, what it keeps, and what it leaves out."""

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from eager import assert_as_accurate_as_eager, assert_matches_eager, assert_same_error, observe, pair, randomise, sample
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torchvision_models import resnet
from training_steps import Operations

import fusedres
from fusedres.backends import reference
from fusedres.bench.work import held_bytes
from fusedres.residual import Residual, Stage, run

BUILDS = {
    "basic, identity": partial(pair, "BasicBlock", 4, 4),
    "basic, projection": partial(pair, "BasicBlock", 4, 6, 2),
    "bottleneck, identity": partial(pair, "Bottleneck", 8, 2),
    "bottleneck, projection": partial(pair, "Bottleneck", 4, 2, 2),
    "bottleneck, groups": partial(pair, "Bottleneck", 8, 2, groups=2),
}
POLICIES = ("fast", "lean", "min")
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def input_of(block, dtype=torch.float64, layout="channels_last"):
    return sample(3, block.conv1.in_channels, 6, 6, dtype=dtype).to(memory_format=LAYOUTS[layout])


def is_segment(y):
    return type(y.grad_fn).__name__ == "SegmentFunctionBackward"


# When


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("build", BUILDS)
def test_a_block_is_one_function(build, training, kernel_backend):
    fused, eager = BUILDS[build]()
    for layout in LAYOUTS:
        x = input_of(fused, layout=layout)
        assert is_segment(copy.deepcopy(fused).train(training)(x))
        assert_matches_eager(fused.train(training), eager.train(training), x)


def test_under_autocast_it_is_as_accurate_as_eager(kernel_backend):
    for build in ("basic, projection", "bottleneck, identity"):
        half = partial(torch.autocast, "cpu", torch.bfloat16)
        builder = partial(BUILDS[build], dtype=torch.float32)
        block, _ = builder()
        with half():
            assert is_segment(block(input_of(block, torch.bfloat16)))
        assert_as_accurate_as_eager(builder, lambda block=block: input_of(block, torch.bfloat16), context=half)


def test_what_autocast_made_possible_is_still_an_error_without_it(kernel_backend):
    fused, eager = BUILDS["basic, projection"](dtype=torch.float32)
    x = input_of(fused, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert is_segment(fused(x))
    assert_same_error(fused, eager, x)


def hooked(block):
    block.conv2.register_forward_hook(lambda *_: None)


def padded_otherwise(block):
    block.conv1.padding_mode = "circular"


def padded_by_name(block):
    block.conv1.padding = "same"


def averaged(block):
    block.bn1.momentum = None


def weight_in_another_layout(block):
    block.conv1.weight.data = block.conv1.weight.data.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("change", [hooked, padded_otherwise, padded_by_name, averaged, weight_in_another_layout])
def test_what_the_function_can_not_compute_runs_op_by_op(change, kernel_backend):
    for build in ("basic, identity", "basic, projection"):
        fused, eager = BUILDS[build]()
        if build == "basic, projection" and change is padded_by_name:
            continue  # not with strides
        for block in (fused, eager):
            change(block)
        x = input_of(fused, layout="contiguous")
        assert not is_segment(fused(x))
        fused.load_state_dict(eager.state_dict())
        assert_matches_eager(fused, eager, x)


def test_a_chain_up_to_an_attention_is_one_function(kernels):
    class Attended(nn.Module):
        residual = Residual(
            (Stage("conv1", "bn1", "act"), Stage("conv2", "bn2", "act"), Stage("conv3", "bn3")),
            shortcut="downsample",
            between=("attention",),
            act="act",
            adds_in_place=False,
        )

        def __init__(self):
            super().__init__()
            for i in (1, 2, 3):
                setattr(self, f"conv{i}", nn.Conv2d(4, 4, 3, padding=1))
                setattr(self, f"bn{i}", nn.BatchNorm2d(4))
            self.attention, self.act, self.downsample = nn.Softmax2d(), nn.ReLU(inplace=True), None

        def eager_forward(self, x):
            out = self.act(self.bn2(self.conv2(self.act(self.bn1(self.conv1(x))))))
            return self.act(self.attention(self.bn3(self.conv3(out))) + x)

        def forward(self, x):
            return run(self, self.residual, x, self.eager_forward)

    fused = Attended()
    randomise(fused)
    fused.double()
    eager = copy.deepcopy(fused)
    eager.__class__ = type("Eager", (Attended,), {"forward": Attended.eager_forward})
    x = sample(3, 4, 6, 6)
    assert_matches_eager(fused, eager, x)
    y = fused(x)  # a node lives no longer than its tensor
    nodes, found = [y.grad_fn], []
    while nodes:
        node = nodes.pop()
        found.append(type(node).__name__)
        nodes += [following for following, _ in node.next_functions if following is not None]
    assert found.count("SegmentFunctionBackward") == 1


# What it leaves out


@pytest.mark.parametrize("build", BUILDS)
def test_gradients_nobody_asked_for_are_not_computed(build, kernel_backend):
    fused, eager = BUILDS[build]()
    names = [name for name, _ in fused.named_parameters()]
    for wanted in (["x"], names, ["x", *names], *[[name] for name in names], ["x", names[-1]]):
        found, work, given = [], [], input_of(fused)
        for block in (fused, eager):
            x = given.clone(memory_format=torch.preserve_format).requires_grad_("x" in wanted)
            for name, parameter in block.named_parameters():
                parameter.grad = None
                parameter.requires_grad_(name in wanted)
            y = block(x)
            with Operations() as operations:
                y.backward(given.sum() * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y).sin())
            found.append({"x": x.grad} | {name: parameter.grad for name, parameter in block.named_parameters()})
            work.append([sum(mask[i] for mask in operations.gradients) for i in range(3)])
        actual, expected = found
        for name, gradient in expected.items():
            assert (actual[name] is None) == (gradient is None), name
            if gradient is not None:
                torch.testing.assert_close(actual[name], gradient, rtol=0, atol=1e-12 * max(1, gradient.abs().max()))
        assert all(ours <= eagers for ours, eagers in zip(*work, strict=True)), f"{wanted}: {work}"


def test_the_shortcuts_gradient_is_added_in_place_or_by_the_convolution(kernel_backend):
    for build, operation in (("bottleneck, identity", "addmm_"), ("basic, identity", "add_")):
        fused, _ = BUILDS[build](dtype=torch.float32)
        y = fused(input_of(fused, torch.float32).requires_grad_())
        with Operations() as operations:
            y.backward(torch.ones_like(y))
        assert operations.count[operation] == 1
        assert not operations.count["add"]


def test_a_strided_projections_gradient_is_added_to_the_pixels_that_it_saw(kernel_backend, monkeypatch):
    spread, added = reference.spread_, []
    monkeypatch.setattr(reference, "spread_", lambda *given: added.append(given[:2]) or spread(*given))
    block, _ = BUILDS["bottleneck, projection"](dtype=torch.float32)
    x = input_of(block, torch.float32)
    for frozen in (False, True):
        block.shortcut.requires_grad_(not frozen)
        block.zero_grad()
        y = block(x.detach().requires_grad_())
        added.clear()
        with Operations() as operations:
            y.backward(torch.ones_like(y))
        ((into, product),) = added
        assert into.shape == x.shape and product.shape == (*x.shape[:2], *y.shape[2:])
        assert operations.count["add_"] == 1 and not operations.count["add"]


def saved(block, x):
    """What a forward keeps, beside its parameters, its input and its output."""
    known = {t.untyped_storage().data_ptr() for t in (x, *block.parameters(), *block.buffers())}
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = block(x)
    known.add(y.untyped_storage().data_ptr())
    return [t for t in kept if t.untyped_storage().data_ptr() not in known], y


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("build", BUILDS)
def test_nothing_is_saved_twice(build, policy, kernel_backend):
    fused, _ = BUILDS[build]()
    for dtype in (torch.float32, torch.bfloat16):
        with fusedres.set_memory(policy), torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            kept, y = saved(fused.float(), input_of(fused, dtype))
        assert is_segment(y)
        storages = [t.untyped_storage().data_ptr() for t in kept if t.numel()]
        assert len(storages) == len(set(storages))


def test_weight_gradients_come_back_in_the_parameters_dtype(kernel_backend):
    fused, _ = BUILDS["bottleneck, projection"]()
    fused.float()
    with torch.autocast("cpu", torch.bfloat16):
        y = fused(input_of(fused, torch.float32))
    assert is_segment(y)
    assert y.dtype is torch.bfloat16
    y.sum().backward()
    assert {parameter.grad.dtype for parameter in fused.parameters()} == {torch.float32}


# Memory policies


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("build", BUILDS)
def test_every_policy_gives_the_same_bits(build, training, native):
    for dtype in (torch.float32, torch.bfloat16):
        for layout in LAYOUTS:
            fused, _ = BUILDS[build](dtype=torch.float32)
            fused.train(training)
            x = input_of(fused, dtype, layout)
            outcomes = []
            for policy in POLICIES:
                block = copy.deepcopy(fused)

                def forward(x, block=block, policy=policy, dtype=dtype):
                    with (
                        fusedres.set_memory(policy),
                        torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16),
                    ):
                        y = block(x)
                    assert is_segment(y)
                    return y

                outcomes.append(observe(forward, x, owner=block))
            for outcome in outcomes[1:]:
                assert torch.equal(outcome.random_state, outcomes[0].random_state)
                for name, expected in outcomes[0].tensors.items():
                    assert torch.equal(outcome.tensors[name], expected), name


def test_a_policy_keeps_what_it_says(kernel_backend):
    fused, _ = BUILDS["bottleneck, projection"]()
    x = input_of(fused)
    n, _, height, width = x.shape
    planes, halved = 2, (height // 2) * (width // 2)
    conv1, conv2, conv3 = (n * planes * height * width, n * planes * halved, n * 4 * planes * halved)
    large = {
        "fast": sorted([conv1, conv1, conv2, conv2, conv3, conv3]),
        "lean": sorted([conv1, conv2, conv3, conv3]),
        "min": sorted([conv1, conv2]),
    }
    for policy, expected in large.items():
        with fusedres.set_memory(policy):
            kept, _ = saved(fused, x)
        assert sorted(t.numel() for t in kept if t.dim() == 4 and t.numel() >= conv2) == expected


@pytest.mark.parametrize("policy, most", [(None, 43.9), ("fast", 41.5), ("lean", 35), ("min", 22)])
def test_a_resnet50_keeps_as_few_bytes_as_promised(policy, most, native):
    """In bf16 at 224 px, MB an image beside the weights, by the hooks and by the allocator; None is eager."""
    model = fusedres.models.resnet50() if policy else resnet.resnet50()
    model.to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 224, 224).to(memory_format=torch.channels_last)
    # What the blocks' weights are rounded to is not kept.
    copied = model.named_parameters() if policy is None else model.fc.named_parameters()
    weights = sum(2 * parameter.numel() for _, parameter in copied if parameter.dim() > 1)

    def forward():
        with fusedres.set_memory(policy or "fast"), torch.autocast("cpu", torch.bfloat16):
            return model(x)

    with fusedres.set_memory(policy or "fast"), torch.autocast("cpu", torch.bfloat16):
        kept, _ = saved(model, x)
    total = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}.values())
    assert len(x) * (most - 2) * 1e6 <= total - weights <= len(x) * most * 1e6
    assert held_bytes(forward)[-1] == pytest.approx(total, rel=1e-3)


def test_activations_that_need_their_input_are_kept_or_computed_again(kernels):
    class Smooth(fusedres.Bottleneck):
        def __init__(self):
            super().__init__(4, 1)
            self.relu = nn.SiLU()

    fused = Smooth()
    randomise(fused)
    fused.double()
    eager = copy.deepcopy(fused)
    eager.__class__ = type("Eager", (Smooth,), {"forward": Smooth.eager_forward})
    for policy in POLICIES:
        with fusedres.set_memory(policy):
            assert_matches_eager(fused, eager, input_of(fused))


def test_a_model_has_a_policy_of_its_own():
    model = nn.Sequential(fusedres.BasicBlock(4, 4), fusedres.BasicBlock(4, 4))
    state = list(model.state_dict())
    x = sample(2, 4, 4, 4, dtype=torch.float32)

    def kept():
        return sum(t.numel() for t in saved(model, x)[0])

    fast = kept()
    with fusedres.set_memory("lean", model):
        lean = kept()
        assert fusedres.memory.of_block(copy.deepcopy(model)[0]) is fusedres.memory.Memory.LEAN
    assert lean < fast == kept()
    with fusedres.set_memory("lean"):
        assert kept() == lean
        with fusedres.set_memory("fast", model):
            assert kept() == fast
        assert kept() == lean
    fusedres.set_memory("lean", model)
    assert kept() == lean
    assert list(model.state_dict()) == state
    with pytest.raises(ValueError, match="policy must be one of fast, lean, min; got 'small'"):
        fusedres.set_memory("small")


def test_without_its_kernels_a_block_trains_op_by_op_under_every_policy():
    fused, eager = BUILDS["basic, identity"]()
    for policy in POLICIES:
        with fusedres.use_backend("reference"), fusedres.set_memory(policy):
            assert_matches_eager(fused, eager, input_of(fused))


@pytest.mark.parametrize(
    "arguments, shape, dtype, most",
    [
        (("BasicBlock", 16, 16), (8, 16, 32, 32), torch.float32, 1.005),  # activations are the most of it
        (("BasicBlock", 32, 32), (2, 32, 16, 16), torch.float32, 1.01),  # both are
        (("Bottleneck", 128, 64, 2), (2, 128, 8, 8), torch.bfloat16, 1.1),  # weights are
    ],
)
def test_a_backward_frees_what_it_is_done_with(arguments, shape, dtype, most, native):
    """Hardly more at once than eager's, which frees what each operation saved as it goes."""
    peaks = []
    for block in pair(*arguments, dtype=torch.float32):
        block.to(memory_format=torch.channels_last)
        x = sample(*shape, dtype=torch.float32).to(memory_format=torch.channels_last)

        def step(block=block, x=x):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
                y = block(x)
            y.float().square().sum().backward()

        step()
        block.zero_grad()
        peaks.append(max(held_bytes(step)))
    assert peaks[0] <= most * peaks[1]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_retained_graph_is_walked_again_and_another_is_not(policy, native):
    fused, _ = BUILDS["bottleneck, projection"](dtype=torch.float32)
    x = input_of(fused, torch.float32).requires_grad_()
    with fusedres.set_memory(policy):
        y = fused(x)
    assert is_segment(y)
    first, again = (torch.autograd.grad(y.sum(), x, retain_graph=retains)[0] for retains in (True, False))
    assert torch.equal(again, first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()


@pytest.mark.parametrize("build", BUILDS)
def test_a_gradient_is_written_over_what_it_is_of_where_nobody_reads_that_again(build, native):
    fused, _ = BUILDS[build](dtype=torch.float32)
    x = input_of(fused, torch.float32)
    held = []

    def pack(t):
        held.append((t, t.detach().clone()))
        return t

    def walks(hooks, **arguments):
        with hooks:
            y = fused(x)
        assert is_segment(y)
        with Operations() as operations:
            y.sum().backward(**arguments)
        return [operations.count[f"fusedres_native::bn_act_backward{way}"] for way in ("", "_")]

    norms = sum(name.startswith("bn") for name, _ in fused.named_children())  # a projection's is part of the last
    assert walks(nullcontext()) == [0, norms]
    assert walks(nullcontext(), retain_graph=True) == [norms, 0]
    assert walks(saved_tensors_hooks(pack, lambda t: t)) == [norms, 0]
    assert all(torch.equal(t, as_saved) for t, as_saved in held)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", ["smooth, identity", "smooth, projection", "frozen"])
def test_only_what_is_owned_and_there_is_written_over(kind, policy, native):
    fused, _ = BUILDS["basic, identity" if "identity" in kind else "basic, projection"](dtype=torch.float32)
    if kind == "frozen":
        fused.eval()
        for name, parameter in fused.named_parameters():
            parameter.requires_grad_("conv" in name)
    else:
        fused.relu = nn.SiLU()
    x = input_of(fused, torch.float32).requires_grad_()
    given = x.detach().clone()
    wanted = [x, *(parameter for parameter in fused.parameters() if parameter.requires_grad)]
    with fusedres.set_memory(policy):
        y = fused(x)
    assert is_segment(y)
    elsewhere, over = (torch.autograd.grad(y.square().sum(), wanted, retain_graph=retains) for retains in (True, False))
    assert all(torch.equal(*gradients) for gradients in zip(elsewhere, over, strict=True)) and torch.equal(x, given)

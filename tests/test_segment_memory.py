"""What a block keeps for its backward, under every policy, what it frees and what it writes over."""

import copy
from contextlib import nullcontext

import pytest
import torch
from eager import assert_matches_eager, observe, pair, randomise, sample
from segments import BUILDS, LAYOUTS, POLICIES, input_of, is_segment
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torchvision_models import resnet
from training_steps import Operations

import fusedres
from fusedres.bench.work import held_bytes


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

"""Hooks on a block, its children or all modules fire as often as in eager and see the same tensors."""

import pytest
import torch
from eager import (
    assert_matches_eager,
    assert_same,
    assert_same_error,
    identity_pair,
    observe,
    projection_pair,
    sample,
)
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

REGISTER = {
    "forward": lambda module, hook: module.register_forward_hook(hook),
    "forward with kwargs": lambda module, hook: module.register_forward_hook(hook, with_kwargs=True),
    "forward always called": lambda module, hook: module.register_forward_hook(hook, always_call=True),
    "forward pre": lambda module, hook: module.register_forward_pre_hook(hook),
    "full backward": lambda module, hook: module.register_full_backward_hook(hook),
    "full backward pre": lambda module, hook: module.register_full_backward_pre_hook(hook),
}

# Whose hook sends the block to its eager path; the others are called by the executor too.
TARGETS = {
    "": "fused",
    "conv1": "fused",
    "bn1": "eager",
    "relu": "eager",
    "conv2": "fused",
    "bn2": "eager",
    "shortcut": "eager",
    "shortcut.0": "fused",
    "shortcut.1": "eager",
}


class Log:
    """Everything a hook was handed, in order."""

    def __init__(self):
        self.calls = []

    def __call__(self, module, *arguments):
        tensors = [t.detach().clone() for t in _flat(arguments)]
        self.calls.append((type(module).__name__.removeprefix("Eager"), tensors))


def _flat(value):
    if isinstance(value, Tensor):
        return [value]
    return [t for item in value for t in _flat(item)] if isinstance(value, tuple | list) else []


def assert_same_calls(actual, expected, *, exact):
    assert [name for name, _ in actual.calls] == [name for name, _ in expected.calls]
    for (name, ours), (_, theirs) in zip(actual.calls, expected.calls, strict=True):
        assert len(ours) == len(theirs)
        for t, u in zip(ours, theirs, strict=True):
            assert_same(f"what {name} was handed", t, u, exact=exact)


def without_inplace(block):
    """Eager refuses a full backward hook around an in-place addition or activation."""
    block.relu.inplace = False
    return block


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", REGISTER)
def test_a_hook_fires_as_in_eager_with_the_same_tensors(kind, target, backend):
    fused, eager = map(without_inplace, projection_pair())
    logs = Log(), Log()
    for block, log in zip((fused, eager), logs, strict=True):
        REGISTER[kind](block.get_submodule(target), log)
    x = sample()
    if "backward" in kind and target == "bn2":
        assert_same_error(fused, eager, x.requires_grad_())
        return
    assert_matches_eager(fused, eager, x, path=TARGETS[target])
    assert logs[1].calls
    assert_same_calls(*logs, exact=TARGETS[target] == "eager" or backend == "reference")


@pytest.mark.parametrize("target", TARGETS)
def test_what_a_hook_returns_is_used(target, backend):
    fused, eager = projection_pair()
    for block in (fused, eager):
        block.get_submodule(target).register_forward_hook(lambda module, args, y: y * 2)
    assert_matches_eager(fused, eager, sample(), path=TARGETS[target])


@pytest.mark.parametrize("target", ["bn1", "relu", "shortcut.1"])
def test_after_a_hook_is_removed_the_block_is_fused_again(target, kernels):
    fused, eager = projection_pair()
    x = sample()
    handle = fused.get_submodule(target).register_forward_hook(lambda module, args, y: None)
    assert_matches_eager(fused, eager, x, path="eager")
    handle.remove()
    assert_matches_eager(fused, eager, x)


def test_hooks_on_an_identity_downsample_fire(backend):
    for downsample in (nn.Identity(), nn.Sequential()):
        fused, eager = identity_pair()
        logs = Log(), Log()
        for block, log in zip((fused, eager), logs, strict=True):
            block.downsample = downsample.__class__()
            block.downsample.register_forward_hook(log)
        x = sample()
        actual, expected = observe(fused, x), observe(eager, x)
        torch.testing.assert_close(actual.tensors, expected.tensors, rtol=1e-12, atol=1e-12)
        assert len(logs[1].calls) == 1
        assert_same_calls(*logs, exact=True)


GLOBAL_HOOKS = {
    "forward": nn_module.register_module_forward_hook,
    "forward pre": nn_module.register_module_forward_pre_hook,
    "full backward": nn_module.register_module_full_backward_hook,
    "full backward pre": nn_module.register_module_full_backward_pre_hook,
}


@pytest.mark.parametrize("kind", GLOBAL_HOOKS)
def test_global_module_hooks_fire_for_every_child_as_in_eager(kind, kernels):
    fused, eager = map(without_inplace, projection_pair())
    x, logs = sample(), (Log(), Log())
    for block, log in zip((fused, eager), logs, strict=True):
        handle = GLOBAL_HOOKS[kind](log)
        try:
            if "backward" in kind:
                with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
                    block(x.requires_grad_())
            else:
                observe(block, x)
        finally:
            handle.remove()
    assert_same_calls(*logs, exact=True)
    if "backward" not in kind:
        assert len(logs[1].calls) == 10


def test_a_global_hook_that_changes_outputs_does_so_as_in_eager(kernels):
    fused, eager = projection_pair()
    handle = nn_module.register_module_forward_hook(
        lambda module, args, y: y + 1 if isinstance(module, nn.BatchNorm2d) else None
    )
    try:
        assert_matches_eager(fused, eager, sample(), path="eager")
    finally:
        handle.remove()


def test_saved_tensor_hooks_see_every_saved_tensor_and_may_repack_it(backend):
    fused, eager = projection_pair()
    packed = []

    def pack(t):
        packed.append(t.shape)
        return t.clone()

    def hooks():
        return torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)

    assert_matches_eager(fused, eager, sample(), context=hooks)
    assert packed

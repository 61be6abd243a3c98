"""An optimized model is never stale: what has changed since its plan was made is noticed at the next call."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from eager import randomise
from optimized import assert_as_accurate, assert_close, counting, errors, hold, images, network, pair
from torch import Tensor, nn
from torch.func import functional_call

import fusedres
from fusedres import families
from fusedres.residual import Residual, Stage


def both(change: Callable[[nn.Module], object]) -> Callable[[nn.Module, nn.Module], None]:
    def apply(model: nn.Module, eager: nn.Module) -> None:
        for module in (model, eager):
            torch.manual_seed(5)
            change(module)

    return apply


def load(model: nn.Module) -> None:
    model.load_state_dict(network().state_dict())


def assign(model: nn.Module) -> None:
    model.load_state_dict(network().state_dict(), assign=True)


def step(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(torch.ones(1, 3, 8, 8)).sum().backward()
    optimizer.step()


def fused_step(kind: type[torch.optim.Optimizer]) -> Callable[[nn.Module], None]:
    """Its kernel doesn't tell the parameters' versions."""

    def apply(model: nn.Module) -> None:
        optimizer = kind(model.parameters(), lr=0.1, fused=True)  # pyright: ignore[reportCallIssue]
        model(torch.ones(1, 3, 8, 8)).sum().backward()
        versions = [parameter._version for parameter in model.parameters()]
        optimizer.step()
        assert versions == [parameter._version for parameter in model.parameters()]
        optimizer.zero_grad()

    return apply


def train_once(model: nn.Module) -> None:
    """The running statistics move, and nothing else."""
    model.train()
    with torch.no_grad():
        model(torch.ones(2, 3, 8, 8) * torch.arange(2.0).view(2, 1, 1, 1))
    model.eval()


def replace_weight(model: nn.Module) -> None:
    model[0].weight = nn.Parameter(2 * model[0].weight.detach())


def wrap_data(model: nn.Module) -> None:
    """Another parameter over the same memory, written to as often as the one before."""
    model[0].weight = nn.Parameter(model[0].weight.data)
    with torch.no_grad():
        model[0].weight.mul_(1.5)


def replace_data(model: nn.Module) -> None:
    model[0].weight.data = 2 * model[0].weight.data


def write_statistics(model: nn.Module) -> None:
    model[3].bn1.running_var.mul_(3)


def replace_child(model: nn.Module) -> None:
    model[3].relu = nn.SiLU()


def replace_block(model: nn.Module) -> None:
    model[3] = nn.Conv2d(4, 4, 3, padding=1).eval()


def append(model: nn.Module) -> None:
    model.append(nn.ReLU())


def patch_forward(model: nn.Module) -> None:
    conv = model[3].conv1
    conv.forward = lambda x: nn.Conv2d.forward(conv, x) + 1


def parametrize(model: nn.Module) -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    nn.utils.parametrize.register_parametrization(model[3].conv1, "weight", Doubled())


def inner_training(model: nn.Module) -> None:
    model[3].bn2.train()


CHANGES = {
    "load_state_dict": load,
    "load_state_dict(assign=True)": assign,
    "optimizer step": step,
    "fused SGD": fused_step(torch.optim.SGD),
    "fused Adam": fused_step(torch.optim.Adam),
    "fused AdamW": fused_step(torch.optim.AdamW),
    "fused Adagrad": fused_step(torch.optim.Adagrad),
    "training step": train_once,
    "another parameter": replace_weight,
    "another parameter's data": replace_data,
    "a parameter over the same data": wrap_data,
    "a statistic written": write_statistics,
    "another child": replace_child,
    "another block": replace_block,
    "one more child": append,
    "another eps": lambda model: setattr(model[1], "eps", 0.5),
    "another stride": lambda model: setattr(model[0], "stride", (2, 2)),
    "another slope": lambda model: setattr(model[2], "negative_slope", 0.5),
    "a patched forward": patch_forward,
    "a parametrization": parametrize,
    "a norm in training": inner_training,
    "a wrapped weight": lambda model: nn.utils.weight_norm(model[3].conv1),
    "a setting of a forward": lambda model: setattr(model[8], "negative", True),
    "fused": fusedres.fuse,
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_what_has_changed_is_noticed_at_the_next_call(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, eager = pair()
    x = images()
    both(CHANGES[name])(model, eager)
    with torch.no_grad():
        with counting(monkeypatch) as seen:
            assert_close(model(x), eager, x)
        assert seen == ["made"]


def test_what_was_folded_is_held_with_its_memory_until_the_next_call() -> None:
    """Or another parameter could have the old one's identity, address and version."""
    model, _ = pair()
    replaced, moved = weakref.ref(model[0].weight), model[7].weight.untyped_storage()._weak_ref()
    model[0].weight = nn.Parameter(torch.zeros_like(model[0].weight))
    model[7].weight.data = torch.zeros_like(model[7].weight)
    gc.collect()
    assert replaced() is not None and not torch.UntypedStorage._expired(moved)
    with torch.no_grad():
        model(images())
    gc.collect()
    assert replaced() is None and torch.UntypedStorage._expired(moved)
    torch.UntypedStorage._free_weak_ref(moved)


class Euler(nn.Module):
    """x + step * f(x), the step an attribute."""

    def __init__(self, step: float | Tensor) -> None:
        super().__init__()
        self.conv, self.norm, self.step = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), step

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) * self.step + x


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("step", [0.5, torch.tensor(0.5), torch.tensor([0.5])], ids=["number", "tensor", "of one"])
def test_a_step_that_is_no_parameter_is_folded_and_watched(
    step: float | Tensor, alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))
    residual = Residual((Stage("conv", "norm"),), shortcut="", gate="step", adds_in_place=False)
    fusedres.register_family(Euler, "euler")(lambda block: residual)
    eager = (Euler(step) if alone else nn.Sequential(Euler(step))).eval()
    randomise(eager)
    model = copy.deepcopy(eager)
    report = fusedres.optimize(model)
    assert [line.step.removeprefix("0.") for line in report.lines] == ["conv+norm+gate+add"]
    x = images(2, 4, 6, 6)
    with torch.no_grad():
        assert_close(model(x), eager, x)
        for module in (model, eager):
            block = module if alone else module[0]
            if isinstance(step, Tensor):
                block.step.mul_(3)
            else:
                block.step = 1.5
        assert_close(model(x), eager, x)


def test_what_has_not_changed_is_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair()
    with torch.no_grad(), counting(monkeypatch) as seen:
        for size in ((2, 3, 8, 8), (1, 3, 8, 8), (2, 3, 10, 6)):
            model(images(*size))
        with torch.inference_mode():
            model(images())
    assert seen == ["ran"] * 4


def test_a_step_that_moves_another_model_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair()
    frozen, other = model[0].weight, nn.Linear(3, 3)
    optimizer = torch.optim.SGD([*other.parameters(), frozen], 0.1, fused=True)
    other(torch.ones(3)).sum().backward()
    with torch.no_grad(), counting(monkeypatch) as seen:
        for _ in range(2):
            optimizer.step()
            model(images())
    assert seen == ["ran"] * 2


def test_a_compiled_step_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, eager = pair()
    x = images()
    for module in (model, eager):
        optimizer = torch.optim.SGD(module.parameters(), 0.1, fused=module is model)
        module(torch.ones(1, 3, 8, 8)).sum().backward()
        torch.compile(optimizer.step, backend="aot_eager")()
    with torch.no_grad(), counting(monkeypatch) as seen:
        assert_close(model(x), eager, x)
    assert seen == ["made"]


def test_a_move_to_another_dtype_and_back_is_noticed() -> None:
    seen = []
    for seed in range(5):
        torch.manual_seed(seed)
        model, eager = pair()
        x = images(16, 3, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(model.double()(x.double()), eager.double()(x.double()), rtol=1e-12, atol=1e-12)
            assert_close(model.float()(x), eager.float(), x)
            seen.append(errors(model.bfloat16(), eager.bfloat16(), x.bfloat16()))
            assert_close(model.float()(x), eager.float(), x)
    assert_as_accurate(seen)


def test_autocast_has_a_plan_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair()
    x = images()
    with torch.no_grad(), counting(monkeypatch) as seen:
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                assert model(x).dtype == torch.bfloat16
            assert model(x).dtype == torch.float32
    assert seen == ["made", "ran", "ran", "ran"]


def test_a_hook_inside_fires_with_eagers_tensors_and_is_gone_when_removed() -> None:
    model, eager = pair()
    x, seen = images(), dict[str, list[Tensor]]()
    handles, exact = [], copy.deepcopy(eager).double()
    for name, module in (("ours", model), ("theirs", eager), ("exact", exact)):
        calls = seen.setdefault(name, [])
        for path in ("0", "3.conv1", "4.downsample.1", "3"):
            inner = module.get_submodule(path)
            handles.append(inner.register_forward_hook(lambda m, args, y, calls=calls: calls.append(y.clone())))
    with torch.no_grad():
        hold(model(x), eager(x), exact(x.double()))
        assert len(seen["ours"]) == 4
        for tensors in zip(seen["ours"], seen["theirs"], seen["exact"], strict=True):
            hold(*tensors)
        for handle in handles:
            handle.remove()
        assert_close(model(x), eager, x)
    assert len(seen["ours"]) == 4


def test_functional_call_computes_with_what_it_is_given() -> None:
    model, eager = pair()
    x, other = images(), network()
    with torch.no_grad():
        assert_close(functional_call(model, other.state_dict(), (x,)), other, x)
        assert_close(model(x), eager, x)

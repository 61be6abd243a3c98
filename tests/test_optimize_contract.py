"""When an optimized model's plan runs and when its own forward does; what makes it stale; copies, threads, tracing."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from eager import randomise
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision_models import resnet

import fusedres
from fusedres import dispatch, families, inference
from fusedres.inference.program import Program
from fusedres.residual import Residual, Stage
from fusedres.swap import Fused, Optimized


class Head(nn.Module):
    """A chain with a setting."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.negative = nn.Conv2d(5, 2, 1), False

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x.view(-1, 5, 1, 1))
        return -x if self.negative else x


def network() -> nn.Module:
    """A stem, an identity and a projection block, a head."""
    down = nn.Sequential(nn.Conv2d(4, 6, 1, 2, bias=False), nn.BatchNorm2d(6))
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.LeakyReLU(),
        resnet.BasicBlock(4, 4),
        resnet.BasicBlock(4, 6, 2, down),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
        Head(),
    )
    randomise(model)
    return model.eval()


def pair() -> tuple[nn.Module, nn.Module]:
    """An optimized network that has made its plan, and its eager twin."""
    eager = network()
    model = copy.deepcopy(eager)
    with torch.no_grad():
        for module in (model, eager):
            module[0].weight.mul_(2)
    fusedres.optimize(model, example=images())
    return model, eager


def images(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 3, 8, 8)))


@contextlib.contextmanager
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What plans are made and run inside."""
    seen: list[str] = []
    bind, call = Program.bind, Program.__call__

    def noted(name: str, method: Callable[[Program, Tensor], Tensor]) -> Callable[[Program, Tensor], Tensor]:
        def method_noted(program: Program, x: Tensor) -> Tensor:
            seen.append(name)
            return method(program, x)

        return method_noted

    with monkeypatch.context() as patch:
        patch.setattr(Program, "bind", noted("made", bind))
        patch.setattr(Program, "__call__", noted("ran", call))
        yield seen


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


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
            assert_close(model(x), eager(x))
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
        assert_close(model(x), eager(x))
        for module in (model, eager):
            block = module if alone else module[0]
            if isinstance(step, Tensor):
                block.step.mul_(3)
            else:
                block.step = 1.5
        assert_close(model(x), eager(x))


def test_what_has_not_changed_is_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair()
    with torch.no_grad(), counting(monkeypatch) as seen:
        for size in ((2, 3, 8, 8), (1, 3, 8, 8), (2, 3, 10, 6)):
            model(images(*size))
        with torch.inference_mode():
            model(images())
    assert seen == ["ran"] * 4


def test_a_move_to_another_dtype_and_back_is_noticed() -> None:
    model, eager = pair()
    x = images()
    with torch.no_grad():
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float32):
            y, expected = model.to(dtype)(x.to(dtype)), eager.to(dtype)(x.to(dtype))
            assert y.dtype == dtype
            torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)


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
    handles = []
    for name, module in (("ours", model), ("theirs", eager)):
        calls = seen.setdefault(name, [])
        for path in ("0", "3.conv1", "4.downsample.1", "3"):
            inner = module.get_submodule(path)
            handles.append(inner.register_forward_hook(lambda m, args, y, calls=calls: calls.append(y.clone())))
    with torch.no_grad():
        assert_close(model(x), eager(x))
        assert len(seen["ours"]) == len(seen["theirs"]) == 4
        for ours, theirs in zip(seen["ours"], seen["theirs"], strict=True):
            assert_close(ours, theirs)
        for handle in handles:
            handle.remove()
        assert_close(model(x), eager(x))
    assert len(seen["ours"]) == 4


def test_functional_call_computes_with_what_it_is_given() -> None:
    model, eager = pair()
    x, state = images(), network().state_dict()
    with torch.no_grad():
        assert_close(functional_call(model, state, (x,)), functional_call(eager, state, (x,)))
        assert_close(model(x), eager(x))


def own_forward(model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    with counting(monkeypatch) as seen:
        y = model(x)
    assert not seen
    return y


def test_with_gradients_and_in_training_its_own_forward_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, eager = pair()
    x = images()
    assert torch.equal(own_forward(model, x, monkeypatch), eager(x))
    assert own_forward(model, x, monkeypatch).requires_grad
    with torch.no_grad():
        assert torch.equal(own_forward(model.train(), x, monkeypatch), eager.train()(x))
    for ours, theirs in zip(model.buffers(), eager.buffers(), strict=True):
        assert torch.equal(ours, theirs)


class Images(Tensor):
    pass


@pytest.mark.parametrize(
    "call",
    [
        lambda model, x: vmap(model)(x[None])[0],
        lambda model, x: torch.jit.trace(model, x, check_trace=False)(x),
        lambda model, x: torch.fx.symbolic_trace(model)(x),
        lambda model, x: torch.export.export(model, (x,)).module()(x),
        lambda model, x: torch.compile(model, backend="aot_eager", fullgraph=True)(x),
        lambda model, x: model(x.as_subclass(Images)).as_subclass(Tensor),
        lambda model, x: model(input=x),
    ],
    ids=["vmap", "trace", "fx", "export", "compile", "subclass", "keyword"],
)
def test_whoever_looks_inside_sees_its_own_forward(
    call: Callable[[nn.Module, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, eager = pair()
    x = images()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        expected = eager(x)
        assert_close(own_forward(lambda x: call(model, x), x, monkeypatch), expected)


def test_scripting_reads_the_original() -> None:
    model, eager = pair()
    x = images()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert_close(torch.jit.script(model)(x), eager(x))


class Listing(TorchDispatchMode):
    """Writes the operations down."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_eagers_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    model, eager = pair()
    listed = []
    with torch.no_grad():
        for module in (model, eager):
            with Listing() as mode:
                module(images())
            listed.append(mode.names)
        assert listed[0] == listed[1]
        monkeypatch.setattr(dispatch, "disabled", True)
        own_forward(model, images(), monkeypatch)


def test_a_global_hook_sees_every_module(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(module))
    try:
        with torch.no_grad():
            own_forward(model, images(), monkeypatch)
    finally:
        handle.remove()
    assert model[3].bn1 in seen


def test_only_classes_change_and_unoptimize_gives_them_back() -> None:
    model = network()
    before = {name: type(module) for name, module in model.named_modules()}
    keys, attributes = list(model.state_dict()), set(vars(model))
    fusedres.optimize(model, example=images())
    fusedres.optimize(model)  # twice is once
    assert isinstance(model, Optimized) and isinstance(model, nn.Sequential) and type(model).__name__ == "Sequential"
    assert list(model.state_dict()) == keys and set(vars(model)) == attributes
    fusedres.unoptimize(model)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert model not in inference._programs


@pytest.mark.parametrize("first", ["fuse", "optimize"])
@pytest.mark.parametrize("undone", ["unfuse", "unoptimize"])
def test_fuse_and_optimize_come_and_go_in_any_order(first: str, undone: str) -> None:
    eager = network()
    model = copy.deepcopy(eager)
    x = images()
    for name in (first, "optimize" if first == "fuse" else "fuse"):
        getattr(fusedres, name)(model)
    assert isinstance(model, Fused) and isinstance(model, Optimized)
    with torch.no_grad():
        assert_close(model(x), eager(x))
    assert_close(model(x), eager(x))
    getattr(fusedres, undone)(model)
    assert isinstance(model, Fused) == (undone == "unoptimize")
    assert isinstance(model, Optimized) == (undone == "unfuse")
    with torch.no_grad():
        assert_close(model(x), eager(x))
    fusedres.unfuse(model)
    fusedres.unoptimize(model)
    assert {type(module) for module in model.modules()} == {type(module) for module in eager.modules()}


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_copy_is_optimized_and_makes_a_plan_of_its_own(fused: bool) -> None:
    model, eager = pair()
    if fused:
        fusedres.fuse(model)
    twin = copy.deepcopy(model)
    assert isinstance(twin, Optimized) and isinstance(twin, Fused) == fused
    x = images()
    with torch.no_grad():
        twin[0].weight.mul_(2)
        assert_close(model(x), eager(x))
        eager[0].weight.mul_(2)
        assert_close(twin(x), eager(x))
    assert isinstance(copy.copy(model), Optimized)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_pickle_is_of_the_original_class_and_holds_no_plan(fused: bool) -> None:
    model, eager = pair()
    if fused:
        fusedres.fuse(model)
    for written in (pickle.dumps(model), saved(model)):
        assert b"fusedres" not in written
        assert len(written) < 1.1 * len(pickle.dumps(eager)) + 2e4
    loaded = pickle.loads(pickle.dumps(model))
    assert {type(module) for module in loaded.modules()} == {type(module) for module in eager.modules()}
    fusedres.optimize(loaded)
    with torch.no_grad():
        x = images()
        assert_close(loaded(x), eager(x))


def saved(model: nn.Module) -> bytes:
    file = io.BytesIO()
    torch.save(model, file)
    return file.getvalue()


def test_a_model_that_nobody_holds_is_freed_with_its_plan() -> None:
    model, _ = pair()
    gone = weakref.ref(model[0].weight)
    gc.collect()
    count = len(inference._programs)
    del model
    gc.collect()
    assert gone() is None
    assert len(inference._programs) == count - 1


def test_eight_threads_on_one_model_get_the_same_results() -> None:
    eager = network()
    model = copy.deepcopy(eager)
    fusedres.optimize(model)
    x = [images(1 + i % 3, 3, 8 + i % 5, 8) for i in range(48)]
    with torch.no_grad():
        expected = [eager(t) for t in x]

    def call(t: Tensor) -> Tensor:
        with torch.no_grad():
            return model(t)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(call, x))
    with torch.no_grad():
        for y, t, theirs in zip(results, x, expected, strict=True):
            assert torch.equal(y, model(t))
            assert_close(y, theirs)


def test_a_plan_made_in_inference_mode_serves_outside_of_it_and_the_other_way_round() -> None:
    eager, x = network(), images()
    model = copy.deepcopy(eager)
    fusedres.optimize(model)
    with torch.inference_mode():
        assert_close(model(x), eager(x))
    with torch.no_grad():
        assert_close(model(x), eager(x))
        assert_close(model(images(1, 3, 8, 8).mul_(0)), eager(torch.zeros(1, 3, 8, 8)))


def test_a_plan_is_not_made_in_a_cuda_graphs_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair()
    x = images()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with torch.no_grad():
        model(x)
        model[0].weight.mul_(2)
        with pytest.raises(RuntimeError, match="has no plan yet for this mode"):
            model(x)


def test_parameters_made_in_inference_mode_have_no_version_and_are_read_every_time() -> None:
    with torch.inference_mode():
        model = network()
        fusedres.optimize(model)
        x = images()
        model(x)
        model[0].weight.mul_(2)
        twin = copy.deepcopy(model)
        fusedres.unoptimize(twin)
        assert_close(model(x), twin(x))

"""When an optimized model's plan runs and when its own forward does; copies, pickles, tracing."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref
from collections.abc import Callable

import pytest
import torch
from optimized import assert_close, counting, images, network, pair
from torch import Tensor, nn
from torch.func import vmap
from torch.utils._python_dispatch import TorchDispatchMode

import fusedres
from fusedres import dispatch, inference, swap
from fusedres.swap import Fused, Optimized


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
        assert_close(own_forward(lambda x: call(model, x), x, monkeypatch), eager, x)


@pytest.mark.parametrize("strict", [True, False])
def test_export_gives_eagers_operations(strict: bool) -> None:
    model, eager = pair()
    exported = [torch.export.export(module, (images(),), strict=strict).graph for module in (model, eager)]
    assert [node.target for node in exported[0].nodes] == [node.target for node in exported[1].nodes]


@pytest.mark.parametrize("strict", [True, False])
def test_export_takes_a_dynamic_batch(strict: bool) -> None:
    model, eager = pair()
    sizes = ({0: torch.export.Dim("n")},)
    exported = torch.export.export(model, (images(),), dynamic_shapes=sizes, strict=strict).module()
    for x in (images(), torch.cat([images(), images()]), images()[:1]):
        assert torch.equal(exported(x), eager(x))


def test_scripting_reads_the_original() -> None:
    model, eager = pair()
    x = images()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert_close(torch.jit.script(model)(x), eager, x)


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
        assert_close(model(x), eager, x)
    assert_close(model(x), eager, x)
    getattr(fusedres, undone)(model)
    assert isinstance(model, Fused) == (undone == "unoptimize")
    assert isinstance(model, Optimized) == (undone == "unfuse")
    with torch.no_grad():
        assert_close(model(x), eager, x)
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
        assert_close(model(x), eager, x)
        eager[0].weight.mul_(2)
        assert_close(twin(x), eager, x)
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
        assert_close(loaded(x), eager, x)


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


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_while_classes_change_changes_none(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = network(), network()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.left(x), self.right(x)

    model, change = Branches().eval(), swap.optimize

    def second_fails(module: nn.Module, server: swap.Server) -> None:
        if module is model.right:
            raise error("no")
        change(module, server)

    monkeypatch.setattr(swap, "optimize", second_fails)
    with pytest.raises(error, match="no"):
        fusedres.optimize(model)
    assert not any(isinstance(module, Optimized) for module in model.modules())


def test_an_error_leaves_an_optimized_model_its_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    model, eager = pair()
    with pytest.raises(RuntimeError, match="channels"):
        fusedres.optimize(model, example=images(2, 5, 8, 8))
    x = images()
    with torch.no_grad(), counting(monkeypatch) as seen:
        assert_close(model(x), eager, x)
    assert seen == ["ran"]


class Owner(nn.Sequential):
    """Copies itself, and is held by what it holds."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__(*modules)
        self.held = [self]

    def __deepcopy__(self, memo: dict[int, object]) -> Owner:
        twin = type(self)(*copy.deepcopy(list(self.children()), memo)).eval()
        twin.copied = True
        return twin


def test_a_copy_is_made_the_classs_own_way_and_keeps_its_circles() -> None:
    x = images()
    for model in (Owner(*pair()[1]).eval(), nn.Sequential(*pair()[1]).eval()):
        model.held = [model]
        fusedres.optimize(model)
        twin = copy.deepcopy(model)
        assert type(twin) is type(model) and twin.held[0] is twin
        assert getattr(twin, "copied", False) == isinstance(model, Owner)
        with torch.no_grad():
            assert torch.equal(twin(x), model(x))


def test_a_plan_made_in_inference_mode_serves_outside_of_it_and_the_other_way_round() -> None:
    eager, x = network(), images()
    model = copy.deepcopy(eager)
    fusedres.optimize(model)
    with torch.inference_mode():
        assert_close(model(x), eager, x)
    with torch.no_grad():
        assert_close(model(x), eager, x)
        assert_close(model(images(1, 3, 8, 8).mul_(0)), eager, torch.zeros(1, 3, 8, 8))


def test_what_was_packed_for_any_size_is_there_before_another_stream_may_read_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settled: list[torch.device] = []
    monkeypatch.setattr("fusedres.inference.program.settle", settled.append)
    model, _ = pair()
    with torch.no_grad():
        (program,) = inference._programs[model].values()
        for size in range(9, 12):
            packed = len(program._packed)
            if size == 11:
                program._packed.popitem()
            settled.clear()
            model(images(2, 3, size, size))
            assert len(settled) == (len(program._packed) > packed or size == 11)
            model(images(2, 3, size, size))
    assert settled == [torch.device("cpu")]


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
        assert_close(model(x), twin, x)

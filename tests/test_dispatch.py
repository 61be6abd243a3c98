"""Which backend serves a call, how that is forced, and what explain says about it."""

import gc
import weakref
from dataclasses import replace

import pytest
import python_backend
import torch
from eager import identity_pair, projection_pair, sample
from torch import nn
from user_blocks import Cifar

import fusedres
from fusedres import dispatch

CHOICES = ", ".join(candidate.name for candidate in dispatch.ORDER)


def served_by(block, x):
    with dispatch.recording(block) as choices:
        block(x)
    return {choice.backend for choice in choices}


@pytest.fixture
def picky():
    """A backend with kernels that objects to everything but channels_last."""

    def objection(request):
        return None if request.layout in ("channels_last", "both") else "x is not channels_last; convert the model"

    backend = replace(python_backend.BACKEND, name="picky", objection=objection)
    with python_backend.registered(backend):
        yield backend


def test_an_unknown_name_is_an_error_that_lists_the_choices():
    with (
        pytest.raises(ValueError, match=f"backend must be one of {CHOICES}; got 'nonsense'"),
        fusedres.use_backend("nonsense"),
    ):
        pass
    assert dispatch._forced is None


def test_a_registered_backend_comes_first_and_is_gone_once_unregistered():
    block, x = projection_pair()[0], sample()
    before = served_by(block, x)
    fusedres.ops.register_backend(python_backend.BACKEND)
    assert served_by(block, x) == {"python"}
    fusedres.ops.unregister_backend(python_backend.BACKEND)
    assert served_by(block, x) == before
    with pytest.raises(ValueError, match="got 'python'"):
        fusedres.use_backend("python").__enter__()


def test_torchscript_never_takes_another_object_for_an_operator_that_left():
    operators = []
    for _ in range(2):  # the first one's last references go with the second one's registration
        with python_backend.registered():
            packet = torch.ops.fusedres_python.bn_act_forward
            operators.append(weakref.ref(packet._op))
            del packet
    gc.collect()
    assert all(operator() is not None for operator in operators)


def test_use_backend_forces_one_nests_and_is_undone_by_an_exception(kernels):
    block, x = projection_pair()[0], sample()
    with fusedres.use_backend("reference"):
        assert served_by(block, x) == {"reference"}
        with fusedres.use_backend("python"):
            assert served_by(block, x) == {"python"}
        assert served_by(block, x) == {"reference"}
        with pytest.raises(KeyError), fusedres.use_backend("python"):
            raise KeyError
        assert served_by(block, x) == {"reference"}
    assert served_by(block, x) == {"python"}


def test_a_backend_with_an_objection_is_passed_over(picky):
    block, x = projection_pair()[0], sample()
    assert "picky" not in served_by(block, x)
    assert served_by(block, x.to(memory_format=torch.channels_last)) == {"picky"}
    assert "picky" not in served_by(block, x)


def test_a_forced_backend_with_an_objection_raises_with_it_and_changes_nothing(picky):
    block, x = projection_pair()[0], sample()
    state = {name: t.clone() for name, t in block.state_dict().items()}
    with (
        fusedres.use_backend("picky"),
        pytest.raises(
            RuntimeError, match="backend 'picky' was asked for, but x is not channels_last; convert the model"
        ),
    ):
        block(x)
    torch.testing.assert_close(block.bn1.running_mean, state["bn1.running_mean"], rtol=0, atol=0)
    torch.testing.assert_close(block.bn1.running_var, state["bn1.running_var"], rtol=0, atol=0)


def test_kernels_object_to_what_they_cannot_see(kernels):
    x = torch.empty(0, 4, 6, 6)
    with fusedres.use_backend("python"), pytest.raises(RuntimeError, match="'python' was asked for, but x is empty"):
        fusedres.ops.affine_act(x, act="relu")
    assert fusedres.ops.affine_act(x, act="relu").shape == x.shape
    assert served_by(projection_pair()[0].eval(), sample(0, 4, 6, 6)) == {"eager path"}


def test_disabling_sends_every_block_to_its_eager_path(monkeypatch, kernels):
    block, x = projection_pair()[0], sample()
    monkeypatch.setattr(dispatch, "disabled", True)
    assert served_by(block, x) == {"eager path"}


@pytest.fixture
def small(monkeypatch):
    """A block, and the largest input that is small."""
    block, x = projection_pair()[0], sample()
    monkeypatch.setattr(dispatch, "min_elements", x.numel() + 1)
    return block, x


def test_a_small_input_takes_the_eager_path(small, monkeypatch, kernels):
    block, x = small
    assert served_by(block, x) == {"eager path"}
    assert "the input is small" in str(fusedres.explain(block, x))
    monkeypatch.setattr(dispatch, "min_elements", x.numel())
    assert served_by(block, x) == {"python"}


def test_a_small_input_is_fused_where_that_was_asked_for(small, kernels):
    block, x = small
    with fusedres.use_backend("python"):
        assert served_by(block, x) == {"python"}
    with fusedres.set_memory("lean"):
        assert served_by(block, x) == {"python"}
    assert served_by(block, x) == {"eager path"}


@pytest.mark.usefixtures("small")
def test_verification_is_of_the_kernels_however_small_the_input():
    model = nn.Sequential(Cifar())
    fusedres.fuse(model)
    wrong = dict(python_backend.BACKEND.kernels)
    wrong["bn_act_forward"] = lambda *arguments: (arguments[0] + 1, *python_backend.bn_act_forward(*arguments)[1:])
    with python_backend.registered(replace(python_backend.BACKEND, kernels=wrong)):
        assert not fusedres.verify(model, torch.randn(2, 4, 6, 6)).agrees
    assert dispatch.min_elements > 0


ENVIRONMENT = """
import fusedres, torch
print(fusedres.explain(fusedres.BasicBlock(3, 4), torch.randn(2, 3, 4, 4)))
"""


def test_the_environment_forces_a_backend(run_python):
    printed = run_python(ENVIRONMENT, FUSEDRES_BACKEND="reference").stdout
    assert [line.split()[:2] for line in printed.splitlines()[1:]] == [["bn_act", "reference"]] * 2


def test_the_environment_naming_an_unknown_backend_is_an_error_at_import(run_python):
    done = run_python(ENVIRONMENT, check=False, FUSEDRES_BACKEND="nonsense")
    assert done.returncode != 0
    assert f"ValueError: backend must be one of {CHOICES}; got 'nonsense'" in done.stderr


def test_the_environment_disables_fusion(run_python):
    printed = run_python(ENVIRONMENT, FUSEDRES_DISABLE="1").stdout
    assert "eager path" in printed
    assert "FUSEDRES_DISABLE is set" in printed


def test_the_environment_says_what_is_small(run_python):
    assert "the input is small" in run_python(ENVIRONMENT, FUSEDRES_MIN_ELEMENTS="97").stdout
    assert "the input is small" in run_python(ENVIRONMENT, FUSEDRES_MIN_ELEMENTS="").stdout
    assert "eager path" not in run_python(ENVIRONMENT, FUSEDRES_MIN_ELEMENTS="96").stdout
    done = run_python(ENVIRONMENT, check=False, FUSEDRES_MIN_ELEMENTS="-1")
    assert "ValueError: FUSEDRES_MIN_ELEMENTS must be a number of elements; got '-1'" in done.stderr


def test_empty_and_zero_environment_values_change_nothing(run_python):
    printed = run_python(ENVIRONMENT, FUSEDRES_DISABLE="0", FUSEDRES_BACKEND="").stdout
    assert "eager path" not in printed


def test_explain_prints_a_row_for_every_op_under_its_blocks_name(kernels):
    model = nn.Sequential(projection_pair()[0], nn.Flatten())
    explanation = fusedres.explain(model, sample())
    rows = str(explanation).splitlines()
    assert rows[0].split() == ["block", "op", "backend", "why", "not", "another"]
    assert [row.split()[:3] for row in rows[1:]] == [["0", "bn_act", "python"]] * 2
    assert [choice.block for choice in explanation.choices] == ["0", "0"]


def test_explain_says_why_a_backend_was_passed_over(picky):
    assert "picky: x is not channels_last; convert the model" in str(fusedres.explain(projection_pair()[0], sample()))


def test_explain_says_so_where_no_block_is_fused():
    assert "no fused block ran" in str(fusedres.explain(nn.Conv2d(4, 4, 1).double(), sample()))


def test_explain_leaves_model_gradients_and_random_state_as_they_were(backend):
    model = nn.Sequential(projection_pair()[0], nn.Dropout(0.5))
    model[0].bn1.eval()
    model(sample()).sum().backward()
    x, random_state = sample(), torch.get_rng_state()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    gradients = [t.grad.clone() for t in model.parameters()]
    flags = [module.training for module in model.modules()]
    fusedres.explain(model, x)
    assert torch.equal(torch.get_rng_state(), random_state)
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    assert all(torch.equal(t.grad, g) for t, g in zip(model.parameters(), gradients, strict=True))
    assert [module.training for module in model.modules()] == flags
    assert dispatch.recorder is None


def test_explain_stops_recording_when_the_model_raises():
    with pytest.raises(RuntimeError):
        fusedres.explain(projection_pair()[0], sample(1, 7, 4, 4))
    assert dispatch.recorder is None


CAUSES = {
    "bn1 has hooks or a patched forward": lambda b: b.bn1.register_forward_hook(lambda module, args, y: None),
    "relu has hooks or a patched forward": lambda b: b.relu.register_forward_pre_hook(lambda module, args: None),
    "shortcut has hooks or a patched forward": lambda b: b.shortcut.register_forward_hook(lambda module, args, y: None),
    "shortcut.1 has hooks or a patched forward": lambda b: b.shortcut[1].register_forward_hook(lambda *_: None),
    "bn2 is a GroupNorm": lambda b: setattr(b, "bn2", nn.GroupNorm(2, 6).double()),
    "bn2 is a Identity": lambda b: setattr(b, "bn2", nn.Identity()),
}


@pytest.mark.parametrize("reason", CAUSES)
def test_explain_names_the_reason_for_an_eager_path(reason):
    block, _ = projection_pair()
    CAUSES[reason](block)
    (choice,) = fusedres.explain(block, sample()).choices
    assert choice.backend == "eager path"
    assert choice.objections == {"fused": reason}


def test_what_surrounds_a_call_is_named_as_the_reason():
    block = identity_pair()[0].eval()
    with dispatch.recording(block) as choices:
        torch.func.grad(lambda x: block(x).sum())(sample())
        with torch.autograd.forward_ad.dual_level():
            block(sample())
    reasons = [choice.objections["fused"] for choice in choices]
    assert reasons == ["a functorch transform is active", "forward-mode AD is active"]


def test_a_backend_without_kernels_for_an_op_leaves_it_to_the_next():
    kernels = {name: f for name, f in python_backend.BACKEND.kernels.items() if "pool" not in name}
    with python_backend.registered(replace(python_backend.BACKEND, name="partial", kernels=kernels)):
        x, norm = torch.randn(2, 3, 4, 4, requires_grad=True), fusedres.ops.Norm(training=True)
        assert fusedres.ops.bn_act_pool(x, norm, kernel_size=2).shape == (2, 3, 2, 2)
        with (
            fusedres.use_backend("partial"),
            pytest.raises(RuntimeError, match="it has no kernels for bn_act_pool"),
        ):
            fusedres.ops.bn_act_pool(x, norm, kernel_size=2)

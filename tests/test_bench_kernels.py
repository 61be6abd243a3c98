"""What a step calls and moves, counted as it runs."""

import pytest
import small_models
import torch
import torch.nn.functional as F

import fusedres
from fusedres import cli, ops
from fusedres.bench import kernels
from fusedres.bench.kernels import Kernel
from fusedres.bench.roofline import Design, layers
from fusedres.bench.work import Work

# `kernels` is the module here, and the name of a fixture.
kernels_in_python = pytest.fixture(lambda kernels: None, name="kernels_in_python")
X = torch.randn(2, 8, 4, 4)
TENSOR, CHANNEL = X.nbytes, 8 * 4


def test_an_operand_is_counted_once_a_pass_and_views_not_at_all():
    weight = torch.randn(8, 8, 1, 1)
    counted = kernels.count(lambda: torch.relu_(F.conv2d(X, weight).view(2, -1)[:1]))
    assert counted == {"aten.convolution": Kernel(1, 2 * TENSOR + weight.nbytes), "aten.relu_": Kernel(1, TENSOR)}


@pytest.mark.parametrize("training", [True, False])
def test_a_norm_reads_what_it_takes_statistics_of_twice(training):
    counted = kernels.count(lambda: F.batch_norm(X, torch.zeros(8), torch.ones(8), training=training))
    moved = counted["aten.native_batch_norm"].bytes - (3 if training else 2) * TENSOR
    assert 0 < moved <= 6 * CHANNEL  # running statistics, mean and rstd


def test_the_fused_op_reads_and_writes_what_the_documents_say(kernels_in_python):
    norm = ops.Norm(training=True)
    x, residual = X.clone().requires_grad_(), X.clone().requires_grad_()

    def step():
        ops.bn_act(x, norm, residual=residual, act="relu").backward(X)

    counted = kernels.count(step)
    mask, stats = 2 * 8 * 2, 3 * CHANNEL
    # x twice, the residual, y, the mask; then dy, the mask and x twice, dx, dr
    assert counted["fusedres_python.bn_act_forward"].bytes == 4 * TENSOR + stats + mask
    assert counted["fusedres_python.bn_act_backward"].bytes == 6 * TENSOR + stats + 2 * mask
    assert sum(kernel.calls for name, kernel in counted.items() if name.startswith("fusedres")) == 2


def test_a_gradient_moves_as_much_over_its_operand(native):
    x, dy = (t.to(memory_format=torch.channels_last) for t in (X.clone(), X))
    operators = torch.ops.fusedres_native
    none = [None] * 2
    _, *stats, mask = operators.bn_act_forward(
        x, *none, *none, x, *none, *none, None, 1, 0, 0.1, 0.1, 0.1, 0.1, 1, True
    )
    needs = [True, True, True, True, False, False, False]
    arguments = dy, None, mask, x, *none, stats[0], None, *none, stats[1], None, 1, 0, 1, needs
    elsewhere, over = (
        kernels.count(lambda operator=operator: operator(*arguments)).popitem()[1]
        for operator in (operators.bn_act_backward, operators.bn_act_backward_)
    )
    assert over == elsewhere


def test_a_fused_step_calls_an_op_for_each_norm_and_moves_what_the_roofline_says(kernels_in_python):
    work = Work("tiny", True, 4, 32, torch.float32, torch.device("cpu"))
    network = small_models.tiny()
    eager, fused = kernels.of_model(network, work).values()
    assert fused["fusedres_python.bn_act_forward"].calls == fused["fusedres_python.bn_act_backward"].calls == 5
    assert eager["aten.native_batch_norm"].calls == 6 and "aten.native_batch_norm" not in fused
    assert not any(name.startswith("fusedres") for name in eager)
    found = layers(network, (4, 3, 32, 32), training=True, dtype=torch.float32)
    elementwise = {d: sum(layer.bytes[d].total for layer in found if layer.kind == "elementwise") for d in Design}
    ours = sum(
        kernel.bytes for name, kernel in fused.items() if name.startswith("fusedres_python") or name == "aten.add_"
    )
    # y and masks on top; the strided projection's gradient is added to a quarter of the pixels, which is less.
    assert ours == pytest.approx(elementwise[Design.FOLDED], rel=0.01)
    names = {f"aten.{name}" for name in ("relu", "relu_", "threshold_backward", "add", "add_")}
    norms = {f"aten.native_batch_norm{way}" for way in ("", "_backward")}
    theirs = sum(eager[name].bytes for name in names | norms)
    assert theirs == pytest.approx(elementwise[Design.EAGER], rel=0.01)


def test_the_command_lists_the_operators_beside_the_designs(capsys, kernels_in_python):
    cli.app(["profile", "small_models:tiny", "--bytes", "--batch", "2", "--size", "32"], standalone_mode=False)
    printed = capsys.readouterr().out
    assert "fusedres_python.bn_act_backward" in printed and "aten.native_batch_norm" in printed
    for design in ("eager", "fused", "folded"):
        assert f"roofline, {design}" in printed
    assert fusedres.__version__ in printed

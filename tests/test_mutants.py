"""The comparisons catch what they are for: each wrong kernel below must fail the one that the right kernels pass."""

from dataclasses import replace

import pytest
import python_backend
import torch
from eager import assert_matches_eager, identity_pair, pair, projection_pair, randomise, sample
from torch import nn

from fusedres.backends import Statistics
from fusedres.epilogue import CATALOGUE
from fusedres.residual import Residual, Stage, run


class Gated(nn.Module):
    """A branch times a trained value per channel."""

    residual = Residual((Stage("conv", "norm"),), shortcut="downsample", gate="gamma", act="act")

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.downsample, self.act = None, nn.ReLU(inplace=True)
        self.gamma = nn.Parameter(torch.linspace(-1, 2, 4))

    def eager_forward(self, x):
        return self.act(self.gamma.view(1, -1, 1, 1) * self.norm(self.conv(x)) + x)

    def forward(self, x):
        return run(self, self.residual, x, self.eager_forward)


class EagerGated(Gated):
    def forward(self, x):
        return self.eager_forward(x)


def gated_pair():
    fused, eager = Gated(), EagerGated()
    randomise(fused)
    eager.load_state_dict(fused.state_dict())
    return fused.double(), eager.double()


def assert_blocks_match_eager():
    for build in (identity_pair, projection_pair, lambda: pair("Bottleneck", 4, 2, 2), gated_pair):
        for training in (True, False):
            for layout in (torch.contiguous_format, torch.channels_last):
                fused, eager = build()
                x = sample().to(memory_format=layout)
                assert_matches_eager(fused.train(training), eager.train(training), x)


def registered(**kernels):
    backend = replace(python_backend.BACKEND, kernels={**python_backend.BACKEND.kernels, **kernels})
    return python_backend.registered(backend)


def test_the_right_kernels_pass():
    with registered():
        assert_blocks_match_eager()


def with_relu(monkeypatch, **changes):
    rows = tuple(replace(row, **changes) if row.name == "relu" else row for row in CATALOGUE)
    monkeypatch.setattr(python_backend, "CATALOGUE", rows)


def mask_dropped(monkeypatch):
    with_relu(monkeypatch, derivative=torch.ones_like)


def mask_of_the_block_end_dropped(monkeypatch):
    monkeypatch.setattr(python_backend, "unpack", lambda mask, dy: torch.ones_like(dy, dtype=torch.bool))


def mask_bits_reversed(monkeypatch):
    unpack = python_backend.unpack
    monkeypatch.setattr(python_backend, "unpack", lambda mask, dy: unpack(mask, dy).flip(1))


def residual_added_after_the_activation(monkeypatch):
    join, write_output, late = python_backend.join, python_backend.write_output, []

    def join_without(x, residual, gate):
        late[:] = [residual]
        return join(x, None, gate)

    def write_and_add(x, z, act, keep_mask):
        y, mask = write_output(x, z, act, keep_mask)
        return (y if late[0] is None else y.add_(late[0].affine())), mask

    monkeypatch.setattr(python_backend, "join", join_without)
    monkeypatch.setattr(python_backend, "write_output", write_and_add)


def gate_left_out(monkeypatch):
    join = python_backend.join
    monkeypatch.setattr(python_backend, "join", lambda x, residual, gate: join(x, residual, None))


def gate_multiplies_the_residual_too(monkeypatch):
    def wrong(x, residual, gate):
        z = x.affine() if residual is None else x.affine() + residual.affine()
        return z if gate is None else gate.double() * z

    monkeypatch.setattr(python_backend, "join", wrong)


def with_statistics(monkeypatch, change):
    """Change (mean, var, running_mean, running_var, momentum, values) between the batch and their use."""
    original = python_backend.batch_statistics

    def wrong(x, running_mean, running_var, source, momentum, eps):
        if source != Statistics.BATCH:
            return original(x, running_mean, running_var, source, momentum, eps)
        return change(original, x, running_mean, running_var, source, momentum, eps)

    monkeypatch.setattr(python_backend, "batch_statistics", wrong)


def normalised_by_the_unbiased_variance(monkeypatch):
    def change(original, x, mean, var, source, momentum, eps):
        stats = original(x, mean, var, source, momentum, eps)
        values = x.numel() // x.shape[1]
        stats[2] = ((stats[2] ** -2 - eps) * values / (values - 1) + eps).rsqrt()
        return stats

    with_statistics(monkeypatch, change)


def running_variance_biased(monkeypatch):
    def change(original, x, mean, var, source, momentum, eps):
        before, values = var.clone(), x.numel() // x.shape[1]
        stats = original(x, mean, var, source, momentum, eps)
        var.copy_(before * (1 - momentum) + (var - before * (1 - momentum)) * (values - 1) / values)
        return stats

    with_statistics(monkeypatch, change)


def running_statistics_not_updated(monkeypatch):
    with_statistics(monkeypatch, lambda original, x, mean, var, *rest: original(x, None, None, *rest))


def running_statistics_updated_twice(monkeypatch):
    def change(original, *arguments):
        original(*arguments)
        return original(*arguments)

    with_statistics(monkeypatch, change)


def momentum_taken_the_other_way(monkeypatch):
    with_statistics(
        monkeypatch,
        lambda original, x, mean, var, source, momentum, eps: original(x, mean, var, source, 1 - momentum, eps),
    )


def eps_left_out(monkeypatch):
    original = python_backend.batch_statistics
    monkeypatch.setattr(python_backend, "batch_statistics", lambda *arguments: original(*arguments[:-1], eps=0.0))


def batch_statistics_in_eval_mode(monkeypatch):
    original = python_backend.batch_statistics
    monkeypatch.setattr(
        python_backend,
        "batch_statistics",
        lambda x, mean, var, source, *rest: (
            original(x, None, None, min(source, Statistics.BATCH), *rest)
            if source == Statistics.RUNNING
            else original(x, mean, var, source, *rest)
        ),
    )


def with_branch_backward(monkeypatch, change):
    original = python_backend.branch_backward

    def wrong(g, operand, from_batch):
        dx, dweight, dbias = original(g, operand, from_batch)
        return change(g, operand, from_batch, dx, dweight, dbias)

    monkeypatch.setattr(python_backend, "branch_backward", wrong)


def dx_without_its_mean_term(monkeypatch):
    def change(g, operand, from_batch, dx, dweight, dbias):
        if from_batch:
            d = operand.weight * operand.rstd * dbias / (g.numel() // g.shape[1])
            dx = dx + python_backend.per_channel(d, g)
        return dx, dweight, dbias

    with_branch_backward(monkeypatch, change)


def dx_without_its_variance_term(monkeypatch):
    def change(g, operand, from_batch, dx, dweight, dbias):
        if from_batch:
            b = operand.weight * operand.rstd**2 * dweight / (g.numel() // g.shape[1])
            dx = dx + python_backend.per_channel(b, g) * operand.centred()
        return dx, dweight, dbias

    with_branch_backward(monkeypatch, change)


def dx_as_of_fixed_statistics(monkeypatch):
    original = python_backend.branch_backward
    monkeypatch.setattr(python_backend, "branch_backward", lambda g, operand, _: original(g, operand, False))


def dx_as_of_batch_statistics_in_eval_mode(monkeypatch):
    original = python_backend.branch_backward
    monkeypatch.setattr(python_backend, "branch_backward", lambda g, operand, _: original(g, operand, True))


def last_pixel_unwritten(monkeypatch):
    write_output = python_backend.write_output

    def wrong(x, z, act, keep_mask):
        y, mask = write_output(x, z, act, keep_mask)
        y[-1, -1, -1, -1] = torch.empty((), dtype=y.dtype)
        return y, mask

    monkeypatch.setattr(python_backend, "write_output", wrong)


def output_always_contiguous(monkeypatch):
    write_output = python_backend.write_output

    def wrong(x, z, act, keep_mask):
        return write_output(x.contiguous(), z, act, keep_mask)

    monkeypatch.setattr(python_backend, "write_output", wrong)


MUTANTS = [
    mask_dropped,
    mask_of_the_block_end_dropped,
    mask_bits_reversed,
    residual_added_after_the_activation,
    gate_left_out,
    gate_multiplies_the_residual_too,
    normalised_by_the_unbiased_variance,
    running_variance_biased,
    running_statistics_not_updated,
    running_statistics_updated_twice,
    momentum_taken_the_other_way,
    eps_left_out,
    batch_statistics_in_eval_mode,
    dx_without_its_mean_term,
    dx_without_its_variance_term,
    dx_as_of_fixed_statistics,
    dx_as_of_batch_statistics_in_eval_mode,
    last_pixel_unwritten,
    output_always_contiguous,
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_wrong_kernel_is_caught(mutant, monkeypatch):
    mutant(monkeypatch)
    with registered(), pytest.raises(AssertionError):
        assert_blocks_match_eager()


def dgate_without_the_bias(dy, y, mask, x, weight, bias, *rest):
    return python_backend.bn_act_backward(dy, y, mask, x, weight, None, *rest)


def gradients_without_the_gate(dy, y, mask, x, weight, bias, stats, residual, weight_r, bias_r, stats_r, gate, *rest):
    gate = None if gate is None else torch.ones_like(gate)
    return python_backend.bn_act_backward(
        dy, y, mask, x, weight, bias, stats, residual, weight_r, bias_r, stats_r, gate, *rest
    )


def residual_gradient_unmasked(dy, *rest):
    dx, dweight, dbias, dr, *others = python_backend.bn_act_backward(dy, *rest)
    return dx, dweight, dbias, dr if not dr.numel() or others[0].numel() else dr.copy_(dy), *others


@pytest.mark.parametrize(
    "backward",
    [dgate_without_the_bias, gradients_without_the_gate, residual_gradient_unmasked],
    ids=lambda backward: backward.__name__,
)
def test_a_wrong_backward_kernel_is_caught(backward):
    with registered(bn_act_backward=backward), pytest.raises(AssertionError):
        assert_blocks_match_eager()

"""The catalogue of activations is one list, and each row means what eager's module means."""

from __future__ import annotations

import importlib
import pickle

import pytest
import torch

from fusedres import epilogue
from fusedres.epilogue import CATALOGUE, Activation, find, of_module

ROWS = pytest.mark.parametrize("row", CATALOGUE, ids=lambda row: row.name)


def module(row: Activation) -> torch.nn.Module:
    return row.module(**dict(row.attributes))


def test_codes_are_positions_and_names_are_unique() -> None:
    assert [row.code for row in CATALOGUE] == list(range(len(CATALOGUE)))
    assert len({row.name for row in CATALOGUE}) == len(CATALOGUE)


@ROWS
def test_the_formula_is_the_modules(row: Activation) -> None:
    z = torch.randn(1000, dtype=torch.float64) * 4
    assert torch.equal(row.formula(z), module(row)(z))
    assert of_module(module(row)) is row


@ROWS
def test_the_derivative_is_autograds_also_at_kinks_and_nan(row: Activation) -> None:
    kinks = torch.tensor([0.0, -0.0, 3.0, -3.0, 6.0, float("inf"), float("nan")], dtype=torch.float64)
    z = torch.cat(
        [torch.randn(1000, dtype=torch.float64) * 4, kinks if row.from_output else kinks[:5]]
    ).requires_grad_()
    y = row.formula(z)
    (expected,) = torch.autograd.grad(y.sum(), z)
    slope = row.derivative(y if row.from_output else z).double()
    assert torch.allclose(slope, expected, rtol=1e-12, atol=1e-12, equal_nan=True)


@ROWS
def test_a_row_is_pickled_by_its_name(row: Activation) -> None:
    assert pickle.loads(pickle.dumps(row)) is row


def test_triton_has_every_activation_under_its_code() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    stated = importlib.import_module("fusedres.backends.triton.epilogue")
    codes = {name.lower(): value.value for name, value in vars(stated).items() if name.isupper()}
    assert codes == {row.name: row.code for row in CATALOGUE}


def test_an_unknown_name_is_answered_with_the_list() -> None:
    with pytest.raises(ValueError, match=r"act must be one of identity, relu, .*got 'swish'"):
        find("swish")


@pytest.mark.parametrize("other", [torch.nn.LeakyReLU(0.2), torch.nn.PReLU(), torch.nn.Mish(), torch.nn.Softplus()])
def test_a_module_outside_the_catalogue_is_not_guessed(other: torch.nn.Module) -> None:
    assert epilogue.of_module(other) is None

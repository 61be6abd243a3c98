"""The Triton backend where there is no GPU: what it objects to, and what importing it does not do."""

from __future__ import annotations

import pytest
import torch

import fusedres
from fusedres import dispatch
from fusedres.backends import Request, triton
from fusedres.ops import Norm, bn_act

FITS = Request("bn_act", "cuda", torch.bfloat16, "channels_last", "relu", 1, torch.float32)


@pytest.fixture(scope="module")
def rules():
    """What torch.compile does with each of torch's functions: found by their names, once, so before any is replaced."""
    torch.compile(lambda x: torch.neg(x), backend="eager")(torch.zeros(()))


@pytest.fixture
def machine(monkeypatch, rules):
    """A machine on which nothing speaks against the kernels."""
    monkeypatch.setattr(triton, "_machine", [])
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(triton.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(triton.shutil, "which", lambda name: name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    return monkeypatch


def test_a_request_that_fits_is_taken(machine) -> None:
    for layout in ("contiguous", "channels_last", "both"):
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            request = FITS._replace(layout=layout, dtype=dtype, parameter_dtype=None, gate_dtype=dtype)
            residual = request._replace(residual_dtype=dtype, residual_layout=layout)
            assert triton.objection(request) is triton.objection(residual) is None
    assert dispatch.objection(triton.BACKEND, FITS) is None
    pooled = FITS._replace(op="bn_act_pool", window_positions=255)
    assert dispatch.objection(triton.BACKEND, pooled) is None
    assert dispatch.objection(triton.BACKEND, pooled._replace(window_positions=256)) is not None


OPERANDS = {
    "its kernels have no torch.float8_e5m2; convert x": {"dtype": torch.float8_e5m2},
    "x is neither contiguous nor channels_last; call x.contiguous": {"layout": "strided"},
    "parameters and running statistics of torch.bfloat16 or of torch.float32, not torch.float64; convert the norm": {
        "parameter_dtype": torch.float64
    },
    "not mixed; convert the norm": {"parameter_dtype": "mixed"},
    "a gate of torch.bfloat16 or torch.float32, not torch.float16; convert the gate": {"gate_dtype": torch.float16},
    "the residual is torch.float32 and x torch.bfloat16; convert": {
        "residual_dtype": torch.float32,
        "residual_layout": "channels_last",
    },
    "the residual is contiguous in memory and x channels_last; bring both": {
        "residual_dtype": torch.bfloat16,
        "residual_layout": "contiguous",
    },
    "the residual is neither contiguous nor channels_last; call residual.contiguous": {
        "residual_dtype": torch.bfloat16,
        "residual_layout": "strided",
    },
}


@pytest.mark.parametrize("message", OPERANDS)
def test_operands_that_do_not_fit_are_objected_to(machine, message: str) -> None:
    reason = triton.objection(FITS._replace(**OPERANDS[message]))
    assert reason is not None and message in reason


MACHINES = {
    "GPUs that are not NVIDIA's": lambda patch: patch.setattr(torch.version, "cuda", None),
    "Triton is not installed; run `pip install triton`": lambda patch: patch.setattr(
        triton.importlib.util, "find_spec", lambda name: None
    ),
    "no C compiler to build its launcher with; install gcc": lambda patch: patch.setattr(
        triton.shutil, "which", lambda name: None
    ),
    "CUDA device 1 is sm_75 and its kernels need sm_80; hide the device": lambda patch: patch.setattr(
        torch.cuda, "get_device_capability", lambda index: ((8, 0), (7, 5))[index]
    ),
}


@pytest.mark.parametrize("message", MACHINES)
def test_a_machine_that_lacks_something_is_objected_to(machine, message: str) -> None:
    MACHINES[message](machine)
    for _ in range(2):
        reason = triton.objection(FITS)
        assert reason is not None and message in reason


def test_the_objection_is_traced_by_torch_compile(machine) -> None:
    def served(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if triton.objection(FITS._replace(compiling=True)) is None else x

    for expected in (1.0, 1.0):
        torch._dynamo.reset()
        assert torch.compile(served, fullgraph=True, backend="eager")(torch.zeros(())).item() == expected


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_other_devices_are_objected_to_by_name(device: str) -> None:
    x = torch.randn(2, 3, 4, 4, device=device)
    with (
        fusedres.use_backend("triton"),
        pytest.raises(
            RuntimeError, match=f"backend 'triton' was asked for, but it has no kernels for {device} tensors"
        ),
    ):
        bn_act(x, Norm(training=True))


CHOOSING = """
import sys, torch, fusedres
from fusedres import dispatch
names = ["native", "triton", "cuda", "onednn", "cudnn", "reference"]
assert [backend.name for backend in dispatch.ORDER] == names
with fusedres.use_backend("reference"):
    fusedres.ops.affine_act(torch.randn(2, 3, 4, 4))
assert "triton" not in sys.modules and not torch.cuda.is_initialized()
"""


def test_choosing_among_the_backends_imports_no_triton(run_python) -> None:
    run_python(CHOOSING)

"""What every test runs under: one thread, a fixed seed, poisoned empties, and the backends by name."""

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import python_backend
import torch

import fusedres

# Deterministic mode makes torch.empty and its kin hold NaN (integers: the largest value), so that a kernel
# which leaves an element unwritten can't pass by luck.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True
torch.set_num_threads(1)


def pytest_configure(config):
    # A few of eager's CUDA operations (the backward of adaptive pooling) have none; they are not under test.
    config.addinivalue_line(
        "filterwarnings", "ignore:.*does not have a deterministic implementation:UserWarning"
    )


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def device():
    return os.environ.get("FUSEDRES_TEST_DEVICE", "cpu")


@pytest.fixture
def on_device(device):
    """Modules and tensors of a test are made on the device under test."""
    with torch.device(device) if device != "cpu" else nullcontext():
        yield


@pytest.fixture(params=["reference", "python"])
def backend(request, on_device):
    """The clause must hold for the reference and for a backend that owns kernels."""
    if request.param == "reference":
        yield "reference"
        return
    fusedres.ops.register_backend(python_backend.BACKEND)
    yield "python"
    fusedres.ops.unregister_backend(python_backend.BACKEND)


@pytest.fixture
def kernels(on_device):
    """Only with the backend that owns kernels: for what could not fail on the reference."""
    fusedres.ops.register_backend(python_backend.BACKEND)
    yield
    fusedres.ops.unregister_backend(python_backend.BACKEND)


@pytest.fixture
def run_python():
    """Run code in a fresh interpreter that finds fusedres and the tests; warnings are errors there too."""

    def run(code, *, check=True, **environment):
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("FUSEDRES_")}
        folders = [str(Path(fusedres.__file__).parents[1]), str(Path(__file__).parent)]
        environment = inherited | {"PYTHONPATH": os.pathsep.join(folders)} | environment
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert not check or done.returncode == 0, done.stderr
        return done

    return run

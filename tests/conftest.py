"""What every test runs under: one thread, a fixed seed, poisoned empties, and the backends by name."""

import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import pytest
import python_backend
import torch
from measured_times import fresh_times  # noqa: F401  a fixture of the tests of what times choose
from stub_fixtures import fake, home, products, stub  # noqa: F401  fixtures of the builder's tests

import fusedres
from fusedres import build, dispatch
from fusedres.backends.triton import machine_objection
from fusedres.native_sources import NATIVE

# Deterministic mode makes torch.empty and its kin hold NaN (integers: the largest value), so that a kernel
# which leaves an element unwritten can't pass by luck.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True
torch.set_num_threads(1)

# Tests are small, and nearly all of them are about what is fused; a variable for the processes that they start.
os.environ["FUSEDRES_MIN_ELEMENTS"] = "0"
dispatch.min_elements = 0

# Run by test_triton_interpreted.py in a process of their own, in which kernels are bound to the interpreter.
collect_ignore = ["interpreted.py", "interpreted_convolutions.py", "interpreted_kernels.py", "interpreted_mutants.py"]

# What the command line needs comes with the extra `cli`; a machine without it still runs everything else.
if not all(find_spec(package) for package in ("typer", "rich", "matplotlib")):
    collect_ignore += ["test_api_page.py", "test_bench.py", "test_bench_command.py", "test_cli.py"]
    collect_ignore += ["test_measured.py", "test_profile.py"]


def pytest_configure(config):
    # A few of eager's CUDA operations (the backward of adaptive pooling) have none; they are not under test.
    config.addinivalue_line("filterwarnings", "ignore:.*does not have a deterministic implementation:UserWarning")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def device():
    return os.environ.get("FUSEDRES_TEST_DEVICE", "cpu")


@pytest.fixture(autouse=True)
def on_device(device):
    """Modules and tensors of a test are made on the device under test."""
    with torch.device(device) if device != "cpu" else nullcontext():
        yield


# The backends with kernels of their own for the device under test.
OWN = ("native",) if os.environ.get("FUSEDRES_TEST_DEVICE", "cpu") == "cpu" else ("triton", "cuda")


FUSED = ("reference", "python", *OWN)


def serving(request):
    """The context in which the backend of a fixture's parameter comes first."""
    if request.param == "reference":
        return fusedres.use_backend("reference")
    request.getfixturevalue("kernels" if request.param == "python" else request.param)
    return nullcontext()


@pytest.fixture(params=FUSED)
def fused_backend(request):
    """The clause must hold for the reference, for kernels in Python, and for those of the device."""
    with serving(request):
        yield request.param


@pytest.fixture(params=[*FUSED, *(["composed"] if "native" in OWN else [])])
def backend(request, monkeypatch):
    """The same of whole blocks: it must hold for small inputs too, which PyTorch's own operators take."""
    if request.param == "composed":
        monkeypatch.setattr(dispatch, "min_elements", 10**9)
        yield request.param
    else:
        with serving(request):
            yield request.param


@pytest.fixture(params=["python", *OWN])
def kernel_backend(request):
    """A backend that owns kernels."""
    request.getfixturevalue("kernels" if request.param == "python" else request.param)
    return request.param


@pytest.fixture
def cuda(device):
    """The compiled CUDA kernels first, only where they can serve; where there is nvcc, they have to."""
    if device == "cpu":
        pytest.skip("the CUDA kernels need a GPU: FUSEDRES_TEST_DEVICE=cuda")
    if shutil.which("nvcc") is None:
        pytest.skip("the CUDA kernels need nvcc")
    with fusedres.use_backend("cuda"):  # which raises with an objection
        fusedres.ops.affine_act(torch.ones(1, 1, 1, 1))
    order = list(dispatch.ORDER)
    dispatch.ORDER.sort(key=lambda backend: backend.name != "cuda")
    dispatch.clear()
    yield
    dispatch.ORDER[:] = order
    dispatch.clear()


@pytest.fixture
def native(device):
    """Only where the compiled CPU kernels can serve; where there is a compiler, they have to."""
    if device != "cpu":
        pytest.skip("the native kernels serve CPU tensors")
    if sys.platform != "linux" or shutil.which("g++") is None:
        pytest.skip("the native kernels need Linux and g++")
    found = build.library(NATIVE)
    assert isinstance(found, build.Library), found.reason


@pytest.fixture
def triton():
    """Only where the Triton kernels can serve, which they must on a GPU."""
    assert (reason := machine_objection()) is None, reason


@pytest.fixture
def kernels():
    """Only with the Python kernels: for what could not fail on the reference."""
    with python_backend.registered():
        yield


@pytest.fixture
def run_python():
    """Run code in a fresh interpreter that finds fusedres and the tests; warnings are errors there too."""

    def run(code, *, check=True, **environment):
        kept = ("FUSEDRES_CACHE", "FUSEDRES_MIN_ELEMENTS")  # the library is built once for all tests
        inherited = {k: v for k, v in os.environ.items() if k in kept or not k.startswith("FUSEDRES_")}
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

"""The package as a whole: what importing it does, and which module may know which."""

import ast
import types
from pathlib import Path

import pytest

import fusedres

ROOT = Path(fusedres.__file__).parent

# From the top down; a module imports from its own layer and from lower ones only.
LAYERS = (
    {"__main__"},
    {"cli"},
    {"bench", "commands"},
    {"doctor", "machine"},
    {"numerics", "testing", "tuning"},
    {"verification"},
    {"fusion", "optimization"},
    {"inference"},
    {"eligibility", "families"},
    {"chains", "proof"},
    {"tracing"},
    {"swap"},
    {"report"},
    {"blocks", "explanation", "models"},
    {"residual"},
    {"composed"},
    {"executor"},
    {"segment"},
    {"synchronised"},
    {"apart", "gates", "memo", "memory", "modules", "ops"},
    {"dispatch"},
    {"backends"},
    {"times"},
    {"host"},
    {"native_sources"},
    {"build"},
    {"nvcc", "target"},
    {"compiler", "tables"},
    {"cache"},
    {"epilogue", "_version"},
)
DEPTH = {name: depth for depth, layer in enumerate(LAYERS) for name in layer}
MODULES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def concept(path):
    """The part of the package a file belongs to: fusedres/ops/bn_act.py is of `ops`."""
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imported(path):
    """The concepts that a file imports from fusedres, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "fusedres" and rest:
                yield rest.partition(".")[0]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downward_only(path):
    own = concept(path)
    assert own in DEPTH, f"give {own} a place in LAYERS"
    for other in imported(path):
        assert DEPTH[own] <= DEPTH[other], f"{own} imports {other}, which stands above it"


def test_the_layers_name_only_what_exists():
    assert set(DEPTH) >= {concept(path) for path in MODULES}


def test_no_module_bears_the_name_of_a_public_function_or_class():
    for name in fusedres.__all__:
        if not isinstance(getattr(fusedres, name), types.ModuleType | str):
            assert not (ROOT / f"{name}.py").exists()
            assert not (ROOT / name).exists()


def test_every_public_name_is_there_and_documented():
    assert len(set(fusedres.__all__)) == len(fusedres.__all__)
    for name in fusedres.__all__:
        assert getattr(fusedres, name).__doc__


IMPORT = """
import os, sys, torch

seen, before = [], set(sys.modules)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

def watch(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        if isinstance(flags, int) and flags & WRITES:
            seen.append(f"{event} {path}")
    elif event.partition(".")[0] in ("subprocess", "os", "shutil", "socket", "tempfile", "ctypes", "urllib"):
        if event not in ("os.listdir", "os.scandir", "os.fspath"):
            seen.append(f"{event} {arguments}")

sys.addaudithook(watch)
import fusedres
assert not seen, seen

loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
assert not loaded & {"torchvision", "timm", "triton", "numpy", "transformers", "pytest"}, loaded
assert "torch._dynamo" not in set(sys.modules) - before
assert not torch.cuda.is_initialized()
assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"])
"""


def test_importing_compiles_writes_prints_and_opens_nothing(run_python, tmp_path):
    done = run_python(
        IMPORT,
        HOME=str(tmp_path),
        XDG_CACHE_HOME=str(tmp_path),
        TMPDIR=str(tmp_path),
        PYTHONDONTWRITEBYTECODE="1",
        OMP_NUM_THREADS="1",
    )
    assert (done.stdout, done.stderr) == ("", "")
    assert not list(tmp_path.iterdir())


UNAVAILABLE = """
import sys, torch
for name in ("torchvision", "timm", "triton"):
    sys.modules[name] = None
import fusedres
fusedres.BasicBlock(4, 6, 2)(torch.randn(2, 4, 6, 6)).sum().backward()
"""


def test_blocks_run_where_no_optional_package_is_installed(run_python, tmp_path):
    run_python(UNAVAILABLE, FUSEDRES_BACKEND="reference", HOME=str(tmp_path))

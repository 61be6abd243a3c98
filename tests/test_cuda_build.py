"""The CUDA library without a GPU: what nvcc makes of it, that it links and loads, what the backend objects to."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import optional
import pytest
import torch
from stub_target import script

from fusedres import build, dispatch, host, nvcc
from fusedres.backends import Request, cuda
from fusedres.compiler import BuildError
from fusedres.native_sources import CSRC, CUDA, CUDA_ELEMENTS, CUDA_FLAGS, cuda_bindings
from fusedres.target import Source, Target

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import compiled_cuda  # noqa: E402

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="compiles CUDA sources: needs nvcc")


@needs_nvcc
def test_machine_code_of_every_kernel() -> None:
    """No warning, spill or local memory; accesses of 128 bits; few instantiations; and the page says the same.

    One test: it compiles for a minute or two.
    """
    tool = compiled_cuda.cuobjdump()
    if tool is None:
        pytest.skip("needs cuobjdump, from the CUDA toolkit or Triton")
    compiled = list(compiled_cuda.kernels(compiled_cuda.EVIDENCE, tool))
    assert {(k.element, k.architecture) for k in compiled} == set(compiled_cuda.EVIDENCE)
    assert not [k for k in compiled if k.stack or k.local or k.float_atomics or k.registers > 128]

    packs = [k for k in compiled if k.name.endswith(("packs of 8", "packs of 4"))]
    assert len(packs) == 12 * (len(compiled_cuda.EVIDENCE) - 1)  # all but fp64's
    assert all(k.loads >= 7 and k.stores >= 1 for k in packs)

    for file in ("forward", "backward"):
        for of in compiled_cuda.EVIDENCE:
            names = [k.name for k in compiled if (k.element, k.architecture) == of and k.name.startswith(file)]
            assert 4 <= len(names) == len(set(names)) <= 48

    page = (ROOT / "docs" / "compiled_cuda.md").read_text()
    if f"nvcc {compiled_cuda.version()}:" in page:
        assert page == "\n".join(compiled_cuda.table(compiled, compiled_cuda.version())) + "\n"


@needs_nvcc
def test_a_spill_is_an_error(tmp_path: Path) -> None:
    twice_the_threads = (*compiled_cuda.STRICT, "-DFUSEDRES_CUDA_THREADS=1024")
    with pytest.raises(BuildError, match=r"ptxas error *: .*([Ss]pill|[Ll]ocal memory)"):
        compiled_cuda.compile_all([("BFloat16", "90a")], tmp_path, twice_the_threads)


ATOMICS = """
__global__ void of_float(float* sum) { atomicAdd(sum, 1.5f); }
__global__ void of_double(double* sum, double* old) { *old = atomicAdd(sum, 1.5); }
__global__ void of_int(int* sum, int* old) { *old = atomicAdd(sum, 1 + threadIdx.x); }
"""


@needs_nvcc
@pytest.mark.parametrize("architecture", ["80", "90a", "120"])
def test_a_float_atomic_is_told_from_a_barriers(tmp_path: Path, architecture: str) -> None:
    """Else none found in the kernels would mean nothing."""
    tool = compiled_cuda.cuobjdump()
    if tool is None:
        pytest.skip("needs cuobjdump, from the CUDA toolkit or Triton")
    (tmp_path / "atomics.cu").write_text(ATOMICS)
    cubin = tmp_path / "atomics.cubin"
    argv = [word for word in nvcc.find().argv if not word.startswith("-gencode")]
    subprocess.run([*argv, f"-arch=sm_{architecture}", "-cubin", "-o", cubin, tmp_path / "atomics.cu"], check=True)
    code = compiled_cuda._run(tool, "-sass", cubin)
    found = {
        name: bool(re.search(compiled_cuda.FLOAT_ATOMIC, text))
        for name, text in re.findall(r"Function : \S*?(of_[a-z]+?)P\S*\n(.*?)(?=Function : |\Z)", code, re.DOTALL)
    }
    assert found == {"of_float": True, "of_double": True, "of_int": False}


STUB = """
#include "cuda/backward.cuh"
#include "cuda/forward.cuh"
namespace fusedres::cuda {
"""
PASSES = """
template <>
cudaError_t forward<TYPE>(const Forward<Accumulation<TYPE>>&, const Context&) { return cudaErrorInvalidValue; }
template <>
cudaError_t backward<TYPE>(const Backward<Accumulation<TYPE>>&, const Context&) { return cudaErrorInvalidValue; }
template <>
cudaError_t forward_facts<TYPE>(const Device&, CudaKernelFacts*) { return cudaErrorInvalidValue; }
template <>
cudaError_t backward_facts<TYPE>(const Device&, CudaKernelFacts*) { return cudaErrorInvalidValue; }
"""


@needs_nvcc
def test_the_binding_links_loads_and_registers_beside_any_torch(tmp_path: Path, monkeypatch) -> None:
    """With the kernels themselves left out: nvcc takes a minute for them."""
    (tmp_path / "stub.cu").write_text(STUB + "".join(PASSES.replace("TYPE", e) for e in CUDA_ELEMENTS) + "}\n")
    monkeypatch.setenv("FUSEDRES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FUSEDRES_CUDA_ARCHITECTURES", "90a")
    optional.package("pybind11")
    sources = (Source(str(tmp_path / "stub.cu")), *cuda_bindings("fusedres_linked", "CUDA"))
    target = Target("linked", CSRC, sources, CUDA_FLAGS, CUDA.link_flags, find=nvcc.find)
    schema = torch.library.Library("fusedres_linked", "DEF")
    for op in ("affine_act_forward", "affine_act_backward", "bn_act_forward", "bn_act_backward"):
        schema.define(str(getattr(torch.ops.fusedres_native, op).default._schema).partition("::")[2])
    found = build.library(target)
    assert isinstance(found, build.Library), found.reason
    assert cuda.built_with(found) == compiled_cuda.version()
    assert torch._C._dispatch_has_kernel_for_dispatch_key("fusedres_linked::bn_act_backward", "CUDA")
    monkeypatch.setattr(host, "CUDA", target)
    assert host.facts()["cuda"] == {"architectures": ["8.0", "9.0"], "devices": {}}  # 8.0: the PTX


REQUEST = Request("bn_act", "cuda", torch.bfloat16, "channels_last", "relu")


def test_a_torch_without_cuda_is_an_objection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert cuda.objection(REQUEST) == "this torch is built without CUDA; install one with it"


def test_an_old_gpu_is_an_objection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: ((9, 0), (7, 5))[index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    assert "this machine has a Tesla T4 (sm_75)" in str(cuda.objection(REQUEST))


@pytest.fixture
def cuda_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if torch were of CUDA 12 and its GPUs were new enough."""
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(build, "_resolved", {})


def fake_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, release: str) -> None:
    (tmp_path / "bin").mkdir()
    script(tmp_path / "bin" / "nvcc", f"echo 'Cuda compilation tools, release {release}, V{release}.1'")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))


@pytest.mark.usefixtures("cuda_torch")
def test_a_toolkit_of_another_major_version_is_an_objection_with_the_fix(tmp_path: Path, monkeypatch) -> None:
    fake_nvcc(tmp_path, monkeypatch, "13.0")
    assert cuda.objection(REQUEST) == (
        "torch is built for CUDA 12.8 and the CUDA toolkit is 13.0; "
        "set CUDA_HOME to a toolkit of CUDA 12, or install a torch for CUDA 13.0"
    )
    assert cuda.mismatch("12.8", "12.4") is None


@pytest.mark.usefixtures("cuda_torch")
def test_a_library_built_ahead_with_another_major_version_is_an_objection_too(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(build, "_resolved", {CUDA: build.Library(tmp_path / "cuda.so", "built ahead")})
    monkeypatch.setattr(build, "recorded_compiler", lambda library: "nvcc (release 12.4, g++ 12)")
    assert cuda.objection(REQUEST) is None
    monkeypatch.setattr(build, "recorded_compiler", lambda library: "nvcc (release 13.0, g++ 12)")
    assert "toolkit is 13.0; set CUDA_HOME to a toolkit of CUDA 12" in str(cuda.objection(REQUEST))


@pytest.mark.usefixtures("cuda_torch", "home")
def test_a_missing_or_old_nvcc_is_an_objection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", "/nonexistent")
    assert "there is no CUDA compiler: /nonexistent/bin/nvcc is not there" in str(cuda.objection(REQUEST))
    build._resolved.clear()
    fake_nvcc(tmp_path, monkeypatch, "12.1")
    assert "need nvcc 12.4 or later" in str(cuda.objection(REQUEST))


@pytest.mark.usefixtures("cuda_torch")
def test_tracing_does_not_build() -> None:
    assert "tracing must not build it" in str(cuda.objection(REQUEST._replace(compiling=True)))


def test_operands_are_objected_to_as_by_the_cpu_kernels() -> None:
    assert "neither contiguous nor channels_last" in str(cuda.objection(REQUEST._replace(layout="strided")))
    assert cuda.operand_objection(REQUEST) is None


def test_pools_are_left_to_other_backends() -> None:
    assert dispatch.objection(cuda.BACKEND, REQUEST._replace(op="bn_act_pool")) == "it has no bn_act_pool"
    assert hasattr(torch.ops.fusedres_cuda, "bn_act") and not hasattr(torch.ops.fusedres_cuda, "bn_act_pool")


@needs_nvcc
def test_architectures_are_those_asked_for_that_nvcc_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDRES_CUDA_ARCHITECTURES", "90a 80")
    codes = [word for word in nvcc.find().argv if word.startswith("-gencode")]
    assert [word.rpartition("=")[2] for word in codes] == ["sm_80", "sm_90a", "compute_80"]
    monkeypatch.setenv("FUSEDRES_CUDA_ARCHITECTURES", "sm_90")
    with pytest.raises(BuildError, match=r"must be of 80, 86, 89, 90a, 100, 120, all; got 'sm_90'"):
        nvcc.find()


@pytest.mark.parametrize(
    "answer, expected", [("echo 9.0; echo 8.6", ["86", "90a"]), ("exit 9", list(nvcc.ARCHITECTURES))]
)
def test_a_build_here_is_for_the_gpus_that_are_here(tmp_path: Path, monkeypatch, answer: str, expected) -> None:
    script(tmp_path / "nvidia-smi", answer)
    script(tmp_path / "nvcc", "echo sm_75; for a in 80 86 89 90 100 120; do echo sm_$a; done")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("FUSEDRES_CUDA_ARCHITECTURES", raising=False)
    assert nvcc.architectures(str(tmp_path / "nvcc")) == expected

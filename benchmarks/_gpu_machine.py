"""Stages `env` and `ceilings`: what the machine is, and the most it can do on random data."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import platform
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from _gpu_stage import ROOT, Run, release

from fusedres import cache
from fusedres.bench.timing import Call, Report, graphed, samples_ms

NVIDIA_SMI_FIELDS = (
    "name,driver_version,pstate,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,"
    "power.draw,power.limit,temperature.gpu,memory.total,memory.used,utilization.gpu,mig.mode.current"
)


def identity(run: Run) -> dict[str, object]:
    """The few facts without which no number means anything; every stage's file begins with them."""
    return {
        "device": run.device.type,
        "device_name": device_name(run),
        "tiny": run.tiny,
        "torch": torch.__version__,
        "commit": git("rev-parse", "HEAD"),
        "tuned_table": tuned_table(run),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def device_name(run: Run) -> str:
    return torch.cuda.get_device_name(run.device) if run.cuda else f"CPU {platform.machine()}"


def tuned_table(run: Run) -> str | None:
    """The digest of what tuning found for this device, and what runs from now on uses; None where there is nothing."""
    path = cache.table(cache.location(), device_name(run))
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def env(run: Run, report: Report) -> list[str]:
    packages = ("numpy", "timm", "torchvision", "triton", "pytest")
    report.data["uncommitted"] = git("--no-optional-locks", "status", "--porcelain", "--untracked-files=no")
    report.data["versions"] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if run.cuda else None,
        **{name: version(name) for name in packages},
    }
    report.data["nvidia_smi"] = nvidia_smi() if run.cuda else None
    if run.cuda:
        facts = torch.cuda.get_device_properties(run.device)
        report.data["gpu"] = {name: getattr(facts, name) for name in dir(facts) if not name.startswith("_")}
    return []


def env_summary(data: dict[str, Any]) -> Iterator[str]:
    if "versions" not in data:
        return
    versions, gpu, smi = data["versions"], data.get("gpu"), data.get("nvidia_smi") or {}
    names = ("python", "cuda", "cudnn", "triton", "torchvision", "timm", "pytest")
    yield f"torch {data['torch']}, " + ", ".join(f"{name} {versions[name]}" for name in names)
    yield f"commit {data['commit']}{', with uncommitted changes' if data['uncommitted'] else ''}"
    if gpu:
        yield (
            f"sm_{gpu['major']}{gpu['minor']}, {gpu['multi_processor_count']} SMs, "
            f"{gpu['total_memory'] / 2**30:.0f} GiB, L2 {gpu['L2_cache_size'] / 2**20:.0f} MiB, "
            f"driver {smi.get('driver_version')}, {smi.get('power.limit')} W limit"
        )


def git(*arguments: str) -> str | None:
    """A git command's output; None outside a repository or where there is no git."""
    if shutil.which("git") is None:
        return None
    answer = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    return answer.stdout.strip() if answer.returncode == 0 else None


def version(package: str) -> str | None:
    """A package's version as installed; None where it's absent."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def nvidia_smi() -> dict[str, str] | None:
    """Clocks, power and temperature as they are found; settings are only ever read."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", f"--query-gpu={NVIDIA_SMI_FIELDS}", "--format=csv,noheader,nounits", "--id=0"]
    answer = subprocess.run(query, capture_output=True, text=True)
    if answer.returncode != 0:
        return {"error": answer.stdout.strip() or answer.stderr.strip()}
    return dict(zip(NVIDIA_SMI_FIELDS.split(","), answer.stdout.strip().split(", "), strict=True))


def ceilings(run: Run, report: Report) -> list[str]:
    copies: dict[str, object] = {}
    products: dict[str, object] = {}
    report.data["copy"], report.data["matmul_bf16"] = copies, products
    for megabytes in run.pick((10, 25, 50, 400), (1, 2)):
        for place in ("memory", "cache"):
            copies[f"{megabytes}MB-{place}"] = copy_bandwidth(run, megabytes * 10**6, in_cache=place == "cache")
            report.save()
            release(run)
    full = ((4096, 4096, 4096), (8192, 8192, 8192), (8192, 8192, 512), (65536, 512, 512))
    for m, n, k in run.pick(full, ((64, 64, 64), (64, 64, 16))):
        products[f"{m}x{n}x{k}"] = matmul_rate(run, m, n, k)
        report.save()
        release(run)
    report.data["nvidia_smi_under_load"] = under_load(run) if run.cuda else None
    return []


def ceilings_summary(data: dict[str, Any]) -> Iterator[str]:
    for name, copy in data.get("copy", {}).items():
        yield f"copy {name:14} {copy['terabytes_per_s']:8.3f} TB/s, read + written"
    for name, product in data.get("matmul_bf16", {}).items():
        yield f"bf16 matmul {name:16} {product['teraflops']:8.2f} TFLOP/s"


def copy_bandwidth(run: Run, size: int, *, in_cache: bool) -> dict[str, object]:
    """Bytes read plus bytes written a second, copying `size` bytes.

    From memory: over pairs of buffers that together are four times the last-level cache, so that none is met
    again while it is cached. In cache: over one pair, whose rate is the cache's only where both buffers fit.
    """
    cache = torch.cuda.get_device_properties(run.device).L2_cache_size if run.cuda else run.pick(64, 1) * 10**6
    pairs = 1 if in_cache else max(2, -(-4 * cache // (2 * size)))
    sources = [torch.randn(size // 4, device=run.device) for _ in range(pairs)]
    targets = [torch.empty_like(source) for source in sources]
    copies = [partial(target.copy_, source) for source, target in zip(sources, targets, strict=True)]
    copies *= max(1, 16 // pairs)

    samples = samples_ms(together(run, copies), run.device, count=run.pick(21, 5), sample_ms=run.pick(20, 2))
    samples = [sample / len(copies) for sample in samples]
    return {
        "bytes_moved": 2 * size,
        "pairs_of_buffers": pairs,
        "fits_in_cache": 2 * size <= cache,
        "terabytes_per_s": 2 * size / median(samples) / 1e9,
        "samples_ms": samples,
    }


def together(run: Run, calls: Sequence[Call]) -> Call:
    """All calls as one; on CUDA one graph: a small copy is over before the next one could be launched."""

    def one_by_one() -> None:
        for call in calls:
            call()

    return graphed(one_by_one) if run.cuda else one_by_one


def matmul_rate(run: Run, m: int, n: int, k: int) -> dict[str, object]:
    a = torch.randn(m, k, device=run.device, dtype=torch.bfloat16)
    b = torch.randn(k, n, device=run.device, dtype=torch.bfloat16)
    out = torch.empty(m, n, device=run.device, dtype=torch.bfloat16)
    samples = samples_ms(partial(torch.mm, a, b, out=out), run.device, count=run.pick(21, 5), sample_ms=run.pick(50, 2))
    return {"teraflops": 2 * m * n * k / median(samples) / 1e9, "samples_ms": samples}


def under_load(run: Run) -> dict[str, str] | None:
    """What nvidia-smi says while two seconds of matrix products are queued: the clocks the numbers had."""
    a = torch.randn(8192, 8192, device=run.device, dtype=torch.bfloat16)
    for _ in range(1000):
        torch.mm(a, a)
    seen = nvidia_smi()
    torch.cuda.synchronize(run.device)
    return seen

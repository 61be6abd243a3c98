"""What fusedres finds here: versions, devices, instruction sets, caches, and which backend serves which op.

`facts` is what `python -m fusedres info --json` prints; `conditions` the few of them that stand beside every
measurement.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fusedres import build, cache, dispatch, host
from fusedres._version import __version__
from fusedres.backends import NORM_OPS, Geometry, Request, Statistics
from fusedres.host import HOST, cpu_name
from fusedres.native_sources import CUDA, NATIVE, VARIANTS
from fusedres.ops.contract import multiplies_tf32

TARGETS = (NATIVE, CUDA, HOST)
PACKAGES = ("numpy", "triton", "torchvision", "timm", "transformers", "onnxruntime", "openvino", "apex")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CONVOLUTION = "conv_act"
OPS = (*NORM_OPS, CONVOLUTION)
LAYOUTS = ("channels_last", "contiguous")
# csrc/params.h numbers its data types so.
_DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

# What glibc needs to be told so that freed memory stays mapped; otherwise every tensor above 32 MiB is mapped anew,
# page fault by page fault, each time it is allocated.
PAGES_KEPT = {
    "MALLOC_MMAP_THRESHOLD_": "8000000000",
    "MALLOC_TRIM_THRESHOLD_": "16000000000",
    "MALLOC_TOP_PAD_": "268435456",
}


def malloc_mode() -> str:
    """ "pages kept" where glibc was told to keep freed memory mapped, "default" otherwise."""
    return "pages kept" if all(os.environ.get(name) for name in PAGES_KEPT) else "default"


def conditions(device: torch.device | None = None) -> dict[str, object]:
    """What a number means nothing without."""
    cuda = device is not None and device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "fusedres": __version__,
        "commit": commit(),
        "malloc": malloc_mode(),
        "python": platform.python_version(),
    }


def commit() -> str | None:
    """The commit that runs, where fusedres is imported from a checkout."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    answer = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
    return answer.stdout.strip() or None


def facts() -> dict[str, Any]:
    """Everything, in JSON's types."""
    backends = list(_backends())  # first: a backend that is asked loads its library
    return {
        "versions": _versions(),
        "devices": _devices(),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith("FUSEDRES_")},
        "malloc": malloc_mode(),
        "library": _library(),
        "cuda_library": _cuda_library(),
        "caches": _caches(),
        "tuned": [{"path": str(table), "bytes": cache.size(table)} for table in cache.tables(cache.location())],
        "backends": backends,
    }


def _versions() -> dict[str, str | None]:
    versions = {"fusedres": __version__, "commit": commit(), "python": platform.python_version()}
    return {**versions, "torch": torch.__version__, "cuda": torch.version.cuda} | {p: version(p) for p in PACKAGES}


def version(package: str) -> str | None:
    """A package's version as installed; None where it's absent."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[dict[str, object]]:
    cpu = {"device": "cpu", "name": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    found: list[dict[str, object]] = [cpu]
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        name = torch.cuda.get_device_name(index)
        found.append({"device": f"cuda:{index}", "name": name, "architecture": f"sm_{major}{minor}"})
    return found


def _library() -> dict[str, object]:
    found = build.library(NATIVE)
    if isinstance(found, build.Unavailable):
        return {"path": None, "reason": found.reason}
    return {
        "path": str(found.path),
        "origin": found.origin,
        "compiled_for": list(VARIANTS),
        "runs_as": {_word(dtype): _variant(found, dtype) for dtype in DTYPES},
    }


def _cuda_library() -> dict[str, object]:
    found = build.resolved(CUDA)
    if found is None:
        return {"path": None, "reason": "no tensor of this machine needs it"}
    if isinstance(found, build.Unavailable):
        return {"path": None, "reason": found.reason}
    architectures = re.findall(r",code=(\w+)", build.recorded_compiler(found))
    known = host.facts()["cuda"] if torch.cuda.is_available() else None  # None without pybind11 too
    kernels = {} if known is None else known["devices"]
    return {"path": str(found.path), "origin": found.origin, "compiled_for": architectures, "kernels": kernels}


def _variant(library: build.Library, dtype: torch.dtype) -> str:
    function = ctypes.CDLL(str(library.path)).fusedres_variant
    function.restype = ctypes.c_char_p
    name: bytes | None = function(_DTYPE_CODES[dtype])
    return name.decode() if name else f"FUSEDRES_CPU_ISA={os.environ['FUSEDRES_CPU_ISA']} is none of its variants"


def _caches() -> list[dict[str, object]]:
    entries = cache.entries(cache.location())
    current = build.current(entries, TARGETS)
    return [{"path": str(entry), "bytes": cache.size(entry), "current": entry in current} for entry in entries]


def _backends() -> Iterator[dict[str, object]]:
    """Of every op, device, data type and layout: who serves it, and why not the others."""
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        for op in OPS:
            for dtype in DTYPES:
                for layout in LAYOUTS:
                    request = _typical_request(op, device, dtype, layout)
                    yield {
                        "op": op,
                        "device": device,
                        "dtype": _word(dtype),
                        "layout": layout,
                        "backend": dispatch.choose(request).name,
                        "objections": dispatch.objections(request),
                    }


def _typical_request(op: str, device: str, dtype: torch.dtype, layout: str) -> Request:
    """Training, with parameters as autocast has them: a block's end with an identity residual, a stem's 3x3 pool.

    A convolution is a 1x1 one of inference, with a residual and 64 channels.
    """
    if op == CONVOLUTION:
        request = Request(op, device, dtype, layout, "relu", 0, dtype, dtype, layout, group=(64, 64))
        return request._replace(window_positions=1, geometry=Geometry(), tf32=multiplies_tf32(dtype, device))
    statistics = Statistics.ABSENT if op == "affine_act" else Statistics.BATCH
    parameters = torch.promote_types(dtype, torch.float32)
    if op == "bn_act_pool":
        return Request(op, device, dtype, layout, "relu", int(statistics), parameters, window_positions=9)
    return Request(op, device, dtype, layout, "relu", int(statistics), parameters, dtype, layout)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def text(found: dict[str, Any]) -> str:
    """The facts as lines for a terminal."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    lines = [versions, ""]
    for device in found["devices"]:
        rest = ", ".join(f"{key} {value}" for key, value in device.items() if key not in ("device", "name"))
        lines.append(f"{device['device']}: {device['name']}, {rest}")
    lines += [f"malloc: {found['malloc']}"]
    lines += [f"{name}={value}" for name, value in found["environment"].items()]
    lines += ["", *_library_lines("CPU", found["library"]), *_library_lines("CUDA", found["cuda_library"])]
    lines += ["", f"cache: {cache.location()}"]
    for entry in found["caches"]:
        use = "in use" if entry["current"] else "of an older key; `python -m fusedres cache --prune` removes it"
        lines.append(f"  {Path(entry['path']).name}  {entry['bytes'] / 2**20:.1f} MiB, {use}")
    lines += [f"  {Path(table['path']).name}  what tuning found" for table in found["tuned"]]
    return "\n".join([*lines, "", *_backend_lines(found["backends"])])


def _library_lines(kind: str, library: dict[str, Any]) -> list[str]:
    if library["path"] is None:
        return [f"{kind} library: none: {library['reason']}"]
    chosen = ", ".join(f"{dtype} as {variant}" for dtype, variant in library.get("runs_as", {}).items())
    here = f"; here {chosen}" if chosen else ""
    lines = [f"{kind} library: {library['path']} ({library['origin']})"]
    lines += [f"  compiled for {', '.join(library['compiled_for'])}{here}"]
    for device, kernels in library.get("kernels", {}).items():
        lines += [f"  {device}", *(f"    {_kernel_words(kernel)}" for kernel in kernels)]
    return lines


def _kernel_words(kernel: dict[str, Any]) -> str:
    return (
        f"{kernel['name']}: sm_{kernel['architecture']}, {kernel['registers']} registers, "
        f"{kernel['blocks_per_multiprocessor']} at a time on a multiprocessor, "
        f"{kernel['on_chip_bytes'] / 2**20:.1f} MiB of a tensor on chip"
    )


def _backend_lines(backends: list[dict[str, Any]]) -> list[str]:
    """A table; rows that differ in the layout or the data type alone are one."""
    rows = [("op", "device", "dtype", "layout", "backend", "why not another")]
    for row in _merged(_merged(backends, "layout"), "dtype"):
        why = "; ".join(f"{name}: {reason}" for name, reason in row["objections"].items())
        rows.append((row["op"], row["device"], row["dtype"], row["layout"], row["backend"], why))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return ["  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[5]]).rstrip() for row in rows]


def _merged(rows: list[dict[str, Any]], field: str) -> list[dict[str, Any]]:
    """One row for those that are equal but for a field, with all that the field says."""
    alike: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        alike.setdefault(repr({**row, field: None}), []).append(row)
    return [{**group[0], field: ", ".join(row[field] for row in group)} for group in alike.values()]

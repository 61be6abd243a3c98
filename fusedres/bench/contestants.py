"""The ways to run a model that a comparison sets side by side, by name; the first one is the baseline."""

from __future__ import annotations

import copy
import importlib
import tempfile
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusedres import dispatch, fusion, optimization
from fusedres.bench.work import Inference, Step, Training, Work

BASELINE = "eager"
CHANNELS_LAST = "eager channels_last"
FUSED = "fusedres"
FUSED_COMPILED = "fusedres, torch.compile"
REMEDY = "pip install 'fusedres[peers]'"
OPTIMIZED = "fusedres.optimize"
FROZEN = "torch.compile, freezing"
POST_OPS = "oneDNN post-ops"


class Absent(Exception):  # noqa: N818  it is an answer
    """A contestant can't take part: one sentence with the reason."""


Entry = Callable[[nn.Module, Work], Step]


def _plain(model: nn.Module, work: Work) -> Step:
    return step_of(copy.deepcopy(model), work.images(), work)


def _channels_last(model: nn.Module, work: Work) -> Step:
    return step_of(*in_channels_last(model, work), work)


def _fused(model: nn.Module, work: Work) -> Step:
    twin, images = in_channels_last(model, work)
    report = fusion.fuse(twin)
    if not report.fused and not report.already_fused:
        raise Absent(f"nothing in this model is fused:\n{report}")
    return step_of(twin, images, work)


def _fused_compiled(model: nn.Module, work: Work) -> Step:
    if not work.training:
        raise Absent(f"training only; {OPTIMIZED} is for inference")
    twin = copy.deepcopy(model)
    fusion.fuse(twin)
    return _compiled(twin, work)


def _compiled(model: nn.Module, work: Work) -> Step:
    twin, images = in_channels_last(model, work)
    twin.compile(dynamic=False)
    return step_of(twin, images, work)


def _optimized(model: nn.Module, work: Work) -> Step:
    _need_inference(work)
    twin, images = in_channels_last(model, work)
    report = optimization.optimize(twin.eval())
    if not report.convolutions:
        raise Absent(str(report))
    return step_of(twin, images, work)


def _post_ops(model: nn.Module, work: Work) -> Step:
    """oneDNN's convolutions as torch has them, wired by hand: packed weights, and everything else in their epilogue."""
    _need_inference_on_cpu(work)
    twin, images = in_channels_last(model, work)
    try:
        with dispatch.use_backend("onednn"):
            optimization.optimize(twin.eval())
    except dispatch.Unserved as reason:
        raise Absent(str(reason)) from reason

    def forward(x: Tensor) -> Tensor:
        with dispatch.use_backend("onednn"):
            return twin(x)

    return Inference(forward, images, work)


def _frozen(model: nn.Module, work: Work) -> Step:
    _need_inference(work)
    twin, images = in_channels_last(model, work)
    # The option keeps its graphs apart from the unfrozen contestant's, and the setting makes Dynamo freeze.
    twin.eval().compile(dynamic=False, options={"freezing": True})
    from torch._inductor import config

    def forward(x: Tensor) -> Tensor:
        with config.patch(freezing=True):
            return twin(x)

    step = Inference(forward, images, work)
    _check_folded(twin, step)
    return step


def _check_folded(model: nn.Module, step: Step) -> None:
    """A frozen graph has its own copy of the weights."""
    weight = next((parameter for parameter in model.parameters() if parameter.dim() == 4), None)
    if weight is None:
        return
    with torch.no_grad():
        before, kept = step.outcome()["outputs"], weight.clone()
        weight.zero_()
        after = step.outcome()["outputs"]
        weight.copy_(kept)
    if not all(torch.equal(y, after[name]) for name, y in before.items()):
        raise Absent("torch.compile did not fold the weights into its graph")


def in_channels_last(model: nn.Module, work: Work) -> tuple[nn.Module, Tensor]:
    twin = copy.deepcopy(model).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return twin, work.images().contiguous(memory_format=torch.channels_last)


def step_of(model: nn.Module, images: Tensor, work: Work) -> Step:
    return Training(model, images, work) if work.training else Inference(model.eval(), images, work)


def _need_inference(work: Work) -> None:
    if work.training:
        raise Absent("inference only")


def _need_inference_on_cpu(work: Work) -> None:
    _need_inference(work)
    if work.device.type != "cpu":
        raise Absent("compared on CPUs only")


def _require(package: str, work: Work, *dtypes: torch.dtype) -> Any:
    if find_spec(package) is None:
        raise Absent(f"{package} is not installed; {REMEDY}")
    _need_inference_on_cpu(work)
    if work.dtype not in dtypes:
        raise Absent(f"its CPU kernels are compared in {', '.join(str(dtype)[6:] for dtype in dtypes)} only")
    return importlib.import_module(package)


def _onnxruntime(model: nn.Module, work: Work) -> Step:
    runtime = _require("onnxruntime", work, torch.float32)
    for package in ("onnx", "onnxscript"):
        if find_spec(package) is None:
            raise Absent(f"exporting to it needs {package}; {REMEDY}")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # it would slow whoever comes next
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        path = Path(folder) / "model.onnx"
        torch.onnx.export(copy.deepcopy(model).eval(), (work.images(),), path, dynamo=True, verbose=False)
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return Inference(lambda x: [torch.from_numpy(y) for y in session.run(None, {name: x.numpy()})], work.images(), work)


def _openvino(model: nn.Module, work: Work) -> Step:
    openvino = _require("openvino", work, torch.float32, torch.bfloat16)
    images = work.images()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the converter's own
        converted = openvino.convert_model(copy.deepcopy(model).eval(), example_input=images)
    precision = "f32" if work.dtype is torch.float32 else "bf16"
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    request = openvino.compile_model(converted, "CPU", settings).create_infer_request()

    def forward(x: Tensor) -> list[Tensor]:
        answer = request.infer([x.numpy()], share_inputs=True, share_outputs=True)
        return [torch.from_numpy(y) for y in answer.values()]

    return Inference(forward, images, work)


ENTRIES: dict[str, Entry] = {
    BASELINE: _plain,
    CHANNELS_LAST: _channels_last,
    FUSED: _fused,
    FUSED_COMPILED: _fused_compiled,
    OPTIMIZED: _optimized,
    "torch.compile": _compiled,
    FROZEN: _frozen,
}
PEERS: dict[str, Entry] = {POST_OPS: _post_ops, "onnxruntime": _onnxruntime, "openvino": _openvino}

"""oneDNN's convolutions, as torch carries them: bias, residual and activation before the result leaves the registers.

Not differentiable. What oneDNN can't do in the same pass follows as one of its own: after a residual it has ReLU alone.
Its ReLU gives 0 for NaN, where eager's gives NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedres.backends import Backend, Convolution, Filter, Geometry, Request
from fusedres.epilogue import IDENTITY, RELU, Activation

# By the catalogue's name: oneDNN's name, its scalars, its algorithm.
_ACTIVATIONS: dict[str, tuple[str, list[float], str]] = {
    "identity": ("none", [], ""),
    "relu": ("relu", [], ""),
    "relu6": ("hardtanh", [0.0, 6.0], ""),
    "leaky_relu": ("leaky_relu", [0.01], ""),
    "silu": ("swish", [], ""),
    "gelu": ("gelu", [], "none"),
    "gelu_tanh": ("gelu", [], "tanh"),
    "hardswish": ("hardswish", [], ""),
}


def pack(taps: Filter, geometry: Geometry, sizes: Sequence[int], joins: bool) -> Filter:
    """The weight in the order that oneDNN asks for. Where no residual is added, the bias may stay wider."""
    weight, bias, _ = taps
    stride, padding, dilation, groups = geometry
    packed = torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, dilation, groups, list(sizes))
    return Filter(packed, bias.to(weight.dtype) if joins and bias is not None else bias)


def run(
    x: Tensor, taps: Filter, residual: Tensor | None, geometry: Geometry, act: Activation, in_place: bool
) -> Tensor:
    weight, bias, _ = taps
    stride, padding, dilation, groups = geometry
    operators = torch.ops.mkldnn
    convolve = operators._convolution_pointwise.default
    if residual is None:
        return convolve(x, weight, bias, padding, stride, dilation, groups, *_ACTIVATIONS[act.name])
    bias = None if bias is None else bias.to(x.dtype)  # the filter may have been packed for no residual
    if x.is_contiguous():  # one pixel, one channel or no image: not channels_last enough for torch to fuse the addition
        y = convolve(x, weight, bias, padding, stride, dilation, groups, *_ACTIVATIONS["identity"])
        return act.formula(y.add_(residual))
    relu = "relu" if act is RELU else None
    if in_place or groups > 1:  # with groups it adds in place only
        y = residual if in_place else residual.clone()
        operators._convolution_pointwise_.binary(
            y, x, weight, bias, padding, stride, dilation, groups, "add", 1.0, relu, [], None
        )
    else:
        y = operators._convolution_pointwise.binary(
            x, residual, weight, bias, padding, stride, dilation, groups, "add", None, relu, [], None
        )
    return y if act is RELU or act is IDENTITY else act.formula(y)


def objection(request: Request) -> str | None:
    """Why oneDNN can't serve a request, as one sentence."""
    if request.device != "cpu":
        return f"it has no convolutions for {request.device} tensors"
    if request.compiling:
        return "torch.compile fuses the reference's operations itself"
    if not torch.backends.mkldnn.is_available():
        return "this torch is built without oneDNN"
    if request.wants_gradient:
        return "its convolutions have no backward; call it under torch.no_grad() or torch.inference_mode()"
    if request.subclass:
        return "x is a tensor subclass, which its operators do not see through"
    return _dtype_objection(request) or _layout_objection(request)


def _dtype_objection(request: Request) -> str | None:
    dtype = request.dtype
    if dtype is torch.bfloat16:
        supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    elif dtype is torch.float16:
        supported = torch.ops.mkldnn._is_mkldnn_fp16_supported()
    else:
        supported = dtype is torch.float32
    if not supported:
        return f"it has no convolution in {dtype} on this machine; convert x and the weight to torch.float32"
    for name, other in (("weight", request.parameter_dtype), ("residual", request.residual_dtype)):
        if other not in (None, dtype):
            return f"the {name} is {other} and x {dtype}; convert one of them"
    return None


def _layout_objection(request: Request) -> str | None:
    for name, order in (("x", request.layout), ("the residual", request.residual_layout)):
        if order in ("contiguous", "strided"):
            return f"{name} is {order} in memory, and it fuses in channels_last only; convert it to channels_last"
    return None


BACKEND = Backend("onednn", objection, convolution=Convolution(pack, run))

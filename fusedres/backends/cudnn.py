"""cuDNN's fused convolutions, as torch carries them: convolution, bias, residual and ReLU in one call.

Not differentiable. The residual is not written in place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.backends import Backend, Convolution, Filter, Geometry, Request, reference
from fusedres.epilogue import Activation

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def run(
    x: Tensor, taps: Filter, residual: Tensor | None, geometry: Geometry, act: Activation, in_place: bool
) -> Tensor:
    weight, bias, _ = taps
    if residual is None:
        return torch.cudnn_convolution_relu(x, weight, bias, *geometry)
    return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *geometry)


def objection(request: Request) -> str | None:
    """Why cuDNN can't serve a request, as one sentence."""
    if request.device != "cuda":
        return f"it has no convolutions for {request.device} tensors"
    if request.compiling:
        return "torch.compile fuses the reference's operations itself"
    if torch.version.cuda is None or not torch.backends.cudnn.is_available():
        return "this torch is built without cuDNN"
    if request.act != "relu":
        return f"it fuses relu only, not {request.act}"
    if request.wants_gradient:
        return "its fused convolutions have no backward; call it under torch.no_grad() or torch.inference_mode()"
    if request.subclass or request.empty:
        return "x is a tensor subclass, or empty"
    if request.dtype not in _DTYPES:
        return f"it has no fused convolution in {request.dtype}; convert x to one of {', '.join(map(str, _DTYPES))}"
    for name, other in (("weight", request.parameter_dtype), ("residual", request.residual_dtype)):
        if other not in (None, request.dtype):
            return f"the {name} is {other} and x {request.dtype}; convert one of them"
    if request.residual_layout not in (None, "both", request.layout):
        return f"the residual is {request.residual_layout} in memory and x {request.layout}; bring both into one layout"
    return None


BACKEND = Backend("cudnn", objection, convolution=Convolution(reference.as_it_is, run))

"""What every op checks, once and before anything is modified, and how a call is described to the dispatcher."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres import dispatch
from fusedres.backends import Affine, Geometry, Norm, Request, Window
from fusedres.backends.ranking import size_class
from fusedres.epilogue import Activation, find

_Pair = int | tuple[int, int]


def activation(act: str | Activation) -> Activation:
    return act if isinstance(act, Activation) else find(act)


def check_tensors(x: Tensor, residual: Tensor | None, gate: Tensor | None) -> None:
    """x: (N, C, ...); residual: x's shape and device; gate: (1 or N, 1 or C, 1, ...)."""
    if not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {x.dtype}; convert it with x.float()")
    if x.dim() < 2:
        raise ValueError(f"x must be (N, C, ...), got {tuple(x.shape)}; add a batch dimension")
    if residual is not None:
        if residual.shape != x.shape:
            raise ValueError(
                f"residual must match x: expected {tuple(x.shape)}, got {tuple(residual.shape)}; "
                "project the shortcut or expand it first"
            )
        if residual.device != x.device or not residual.is_floating_point():
            raise ValueError(
                f"residual must be a floating-point tensor on {x.device}, "
                f"got {residual.dtype} on {residual.device}; convert it with residual.to(x)"
            )
    if gate is not None:
        fits = gate.dim() == x.dim() and all(
            size == 1 or (size == full and d < 2)
            for d, (size, full) in enumerate(zip(gate.shape, x.shape, strict=True))
        )
        if not fits:
            raise ValueError(
                f"gate must be (1 or N, 1 or C, 1, ...) for x {tuple(x.shape)}, got {tuple(gate.shape)}; "
                "reshape it, or multiply first"
            )
        if gate.device != x.device or not gate.is_floating_point():
            raise ValueError(
                f"gate must be a floating-point tensor on {x.device}, got {gate.dtype} on {gate.device}; "
                "convert it with gate.to(x)"
            )


def check_branch(x: Tensor, name: str, branch: Affine | Norm | None, operand: Tensor | None = None) -> None:
    """The tensors among a branch's members: (C,), floating point, on x's device."""
    if branch is None:
        return
    if operand is None:
        raise ValueError(f"{name} was given without a residual; pass residual= as well, or drop {name}=")
    expected, device = x.shape[1:2], x.device
    for t in branch[:4]:
        if isinstance(t, Tensor) and (t.shape != expected or t.device != device or not t.is_floating_point()):
            raise ValueError(
                f"{name} must hold one floating-point value per channel of x: expected {tuple(expected)} on {device}, "
                f"got {tuple(t.shape)} {t.dtype} on {t.device}; build it with {x.shape[1]} channels, or use .to()"
            )


def check_norm(x: Tensor, name: str, norm: Norm | None, operand: Tensor | None) -> None:
    """The same, and what eager's batch norm demands: statistics to use, and more than one value to take them from."""
    check_branch(x, name, norm, operand)
    if norm is None:
        return
    if norm.training:
        values = x.numel() // max(x.shape[1], 1)
        if values == 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.size()}")
        if norm.eps <= 0.0:
            raise ValueError(f"{name}.eps must be positive when training, got {norm.eps}; pass eps=1e-5")
    elif norm.running_mean is None or norm.running_var is None:
        raise ValueError(f"{name} must have running_mean and running_var unless training=True; pass both")


def window(x: Tensor, kernel_size: _Pair, stride: _Pair | None, padding: _Pair) -> Window:
    """The windows that these arguments of eager's max-pool mean, none of them empty."""
    if x.dim() != 4:
        raise ValueError(f"x must be (N, C, H, W), got {tuple(x.shape)}; reshape it to four dimensions")
    found = Window(_pair(kernel_size), _pair(kernel_size if stride is None else stride), _pair(padding))
    if min(*found.kernel_size, *found.stride) < 1:
        raise ValueError(
            f"kernel_size and stride must be at least 1, got {found.kernel_size} and {found.stride}; pass stride=None "
            "for windows that do not overlap"
        )
    if any(p < 0 or 2 * p > k for p, k in zip(found.padding, found.kernel_size, strict=True)):
        raise ValueError(
            f"padding must be at most half of kernel_size, got {found.padding} for {found.kernel_size}; pad x instead"
        )
    height, width = x.shape[2:]
    if min(found.output_size(height, width)) < 1:
        raise ValueError(
            f"x must hold at least one window of {found.kernel_size} with padding {found.padding}, "
            f"got {tuple(x.shape)}; pass a smaller kernel_size"
        )
    return found


def geometry(stride: _Pair, padding: _Pair, dilation: _Pair, groups: int) -> Geometry:
    """How these arguments of eager's convolution lay its windows."""
    found = Geometry(_pair(stride), _pair(padding), _pair(dilation), groups)
    if min(*found.stride, *found.dilation, groups) < 1 or min(found.padding) < 0:
        raise ValueError(
            "stride, dilation and groups must be at least 1 and padding at least 0, "
            f"got {found.stride}, {found.dilation}, {groups} and {found.padding}"
        )
    return found


def check_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, geometry: Geometry
) -> None:
    """x: (N, I, H, W); weight: (O, I / groups, rows, columns); bias: (O,); residual: y's shape; all on one device."""
    check_tensors(x, None, None)
    if x.dim() != 4 or weight.dim() != 4:
        raise ValueError(
            f"x and weight must have 4 dimensions, got {tuple(x.shape)} and {tuple(weight.shape)}; "
            "add a batch dimension to a single image"
        )
    out, width, *kernel = weight.shape
    if width * geometry.groups != x.shape[1] or out % geometry.groups:
        raise ValueError(
            f"weight must be (O, {x.shape[1]} / groups, rows, columns) with O a multiple of groups={geometry.groups}, "
            f"got {tuple(weight.shape)}; pass the groups that the weight was made for"
        )
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and (t.device != x.device or t.dtype != x.dtype):
            raise ValueError(
                f"{name} must be {x.dtype} on {x.device} as x is, got {t.dtype} on {t.device}; "
                f"convert it with {name}.to(x)"
            )
    if bias is not None and bias.shape != (out,):
        raise ValueError(f"bias must have shape ({out},), got {tuple(bias.shape)}; pass one value a channel of y")
    rows, columns = geometry.output_size((kernel[0], kernel[1]), *x.shape[2:])
    if min(rows, columns) < 1:
        raise ValueError(
            f"x must hold at least one window of {tuple(kernel)} with padding {geometry.padding}, "
            f"got {tuple(x.shape)}; pad x or pass a smaller weight"
        )
    expected = (x.shape[0], out, rows, columns)
    if residual is not None and (residual.shape != expected or residual.device != x.device):
        raise ValueError(
            f"residual must match y: expected {expected} on {x.device}, got {tuple(residual.shape)} on "
            f"{residual.device}; project the shortcut or expand it first"
        )
    if residual is not None and not residual.is_floating_point():
        raise TypeError(f"residual must be a floating-point tensor, got {residual.dtype}; convert it to {x.dtype}")


def multiplies_tf32(dtype: torch.dtype, device: str) -> bool:
    """Whether eager may multiply a convolution's float32 as TF32 there; torch.compile need not know."""
    if dtype is not torch.float32 or device != "cuda" or torch.compiler.is_compiling():
        return False
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # pyright: ignore[reportAttributeAccessIssue]


def _pair(value: _Pair) -> tuple[int, int]:
    rows, columns = (value, value) if isinstance(value, int) else value
    return rows, columns


def parameter_dtype(*branches: Affine | Norm | None) -> torch.dtype | str | None:
    """The one dtype of all per-channel tensors, "mixed", or None."""
    found = None
    for branch in branches:
        for t in branch[:4] if branch is not None else ():
            if isinstance(t, Tensor):
                if found is not None and t.dtype != found:
                    return "mixed"
                found = t.dtype
    return found


def request(
    op: str,
    x: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    act: Activation,
    parameter_dtype: torch.dtype | str | None,
    statistics: int = 0,
    residual_statistics: int = 0,
    window_positions: int = 0,
) -> Request:
    """The metadata by which a backend is chosen."""
    return Request(
        op,
        x.device.type,
        x.dtype,
        dispatch.layout(x),
        act.name,
        statistics,
        parameter_dtype,
        None if residual is None else residual.dtype,
        None if residual is None else dispatch.layout(residual),
        residual_statistics,
        None if gate is None else gate.dtype,
        x.numel() == 0,
        type(x) is not Tensor and type(x) is not torch.nn.Parameter,
        torch.compiler.is_compiling(),
        window_positions,
        size_class=size_class(x.device.type, x.numel()),
    )

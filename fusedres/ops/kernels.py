"""How a backend's kernels become operators: schemas, fakes and autograd, the same for every backend.

Each backend has the operators in a namespace of its own, so that two of them can serve one device. The autograd
function is the op's Autograd kernel: that carries mutable running statistics through opcheck and fullgraph
compilation, which register_autograd refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from fusedres import dispatch
from fusedres.backends import Backend
from fusedres.epilogue import Activation


class InPlace(NamedTuple):
    """A backward that writes gradients over what they are of: its schema's arguments, and its results."""

    arguments: str
    fake: Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Spec:
    """One op as every kernel backend implements it.

    Args:
        arguments: the schema's argument list, shared by the op and its forward kernel.
        backward_arguments: those of the backward kernel; `needs` comes last.
        results: what the forward kernel returns; what it keeps for the backward alone comes last.
        fake_forward, fake_backward: shapes, dtypes and strides of the results.
        function: the autograd.Function; its `apply` takes the Kernels and then the op's arguments.
        gradients: how many gradients the backward kernel returns.
        in_place: of the operator `Kernels.backward_in_place`, where there is one.
        kept: the word for the last result; `keep_<kept>` tells the forward kernel to fill it.
    """

    name: str
    arguments: str
    backward_arguments: str
    results: str
    fake_forward: Callable[..., tuple[Tensor, ...]]
    fake_backward: Callable[..., tuple[Tensor, ...]]
    function: type[torch.autograd.Function]
    gradients: int = 7
    in_place: InPlace | None = None
    kept: str = "mask"


class Operators(Protocol):
    """What an autograd function computes an op with: `forward` and `backward` by the schemas' arguments."""

    @property
    def backend(self) -> Backend: ...
    @property
    def forward(self) -> Callable[..., Any]: ...
    @property
    def backward(self) -> Callable[..., Any]: ...
    @property
    def backward_in_place(self) -> Callable[..., Any] | None: ...


class Kernels:
    """One op's operators of one backend: `op` differentiable, `forward` and `backward` as they are.

    `backward_in_place`, of compiled kernels, writes the gradients of operands that nobody reads any more over these.
    What it returns is empty in their places.
    """

    def __init__(self, spec: Spec, backend: Backend, library: torch.library.Library) -> None:
        name, namespace = spec.name, library.ns
        gradients = ", ".join(["Tensor"] * spec.gradients)
        library.define(f"{name}({spec.arguments}) -> Tensor")
        library.define(f"{name}_forward({spec.arguments}, bool keep_{spec.kept}) -> ({spec.results})")
        needs = f"bool[{spec.gradients}] needs"
        library.define(f"{name}_backward({spec.backward_arguments}, {needs}) -> ({gradients})")

        in_place = spec.in_place if f"{name}_backward" not in backend.kernels else None
        if in_place is not None:
            library.define(f"{name}_backward_({in_place.arguments}, {needs}) -> ({gradients})")
            torch.library.register_fake(f"{namespace}::{name}_backward_", in_place.fake, lib=library)

        operators = getattr(torch.ops, namespace)
        self.backend = backend
        self.function = spec.function
        self.op = getattr(operators, name).default
        self.forward = getattr(operators, f"{name}_forward").default
        self.backward = getattr(operators, f"{name}_backward").default
        self.backward_in_place = getattr(operators, f"{name}_backward_").default if in_place is not None else None

        def no_gradient(*arguments: Any) -> Tensor:
            return self.forward(*arguments, False)[0]

        def differentiable(*arguments: Any) -> Tensor:
            return spec.function.apply(self, *arguments)  # pyright: ignore[reportReturnType]

        def fake(*arguments: Any) -> Tensor:
            return spec.fake_forward(*arguments, False)[0]

        library.impl(name, differentiable, "Autograd")
        for key in backend.keys:
            library.impl(name, no_gradient, key)
            for kernel in (f"{name}_forward", f"{name}_backward"):
                if kernel in backend.kernels:
                    library.impl(kernel, backend.kernels[kernel], key)
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
        torch.library.register_fake(f"{namespace}::{name}_forward", spec.fake_forward, lib=library)
        torch.library.register_fake(f"{namespace}::{name}_backward", spec.fake_backward, lib=library)

    def __call__(self, *arguments: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return self.op(*arguments)
        if torch.is_grad_enabled():
            # Straight to the autograd function: two trips through the dispatcher less than the op costs.
            return self.function.apply(self, *arguments)  # pyright: ignore[reportReturnType]
        return self.forward(*arguments, False)[0]


_registered: dict[tuple[str, str], Kernels] = {}
_libraries: dict[str, torch.library.Library] = {}
# TorchScript remembers an operator by its id() and for ever. Were a retired one freed, whatever object took its place
# in memory would pass for it, and a model that holds that object could not be scripted.
_retired: list[Kernels] = []


def of(backend: Backend, op: str) -> Kernels:
    """The registered operators of `op`."""
    return _registered[backend.name, op]


def bind(backend: Backend, specs: tuple[Spec, ...]) -> None:
    """Define the operators of a backend that owns kernels."""
    if backend.keys:
        library = torch.library.Library(f"fusedres_{backend.name}", "DEF")
        for spec in specs:
            if backend.computes(spec.name):
                _registered[backend.name, spec.name] = Kernels(spec, backend, library)
        _libraries[backend.name] = library


def register(backend: Backend, specs: tuple[Spec, ...]) -> None:
    """Bind a backend and put it first in the dispatcher's order."""
    bind(backend, specs)
    dispatch.ORDER.insert(0, backend)
    dispatch.clear()


def unregister(backend: Backend) -> None:
    """Undo `register`."""
    dispatch.ORDER.remove(backend)
    dispatch.clear()
    for key in [key for key in _registered if key[0] == backend.name]:
        _retired.append(_registered.pop(key))
    library = _libraries.pop(backend.name, None)
    if library is not None:
        library._destroy()


def empty_output(x: Tensor) -> Tensor:
    """An output as eager's batch norm allocates it: dense, channels_last where x is or nearly is, contiguous where it
    is both (one channel, one pixel)."""
    return torch.empty_like(x, memory_format=_dense_format(x))


def _dense_format(x: Tensor) -> torch.memory_format:
    return torch.contiguous_format if x.is_contiguous() else suggest_memory_format(x)


def nothing(x: Tensor) -> Tensor:
    """What stands for a result that is not wanted."""
    return x.new_empty(0)


def is_channels_last(y: Tensor) -> bool:
    """Whether y's channels are innermost in memory."""
    return suggest_memory_format(y) in (torch.channels_last, torch.channels_last_3d)


def empty_mask(y: Tensor, keep: bool) -> Tensor:
    """One bit an element, least significant first; every row begins on a byte.

    A row is a pixel of channels_last, shape (N*H*W, bytes), or a plane of contiguous, shape (N, C, bytes), unless a
    plane is one pixel: the backward reads the order off the number of dimensions, whatever order dy comes in.
    """
    if not keep or y.numel() == 0:
        return y.new_empty(0, dtype=torch.uint8)
    n, c, *_ = y.shape
    pixels = y.numel() // (n * c)
    by_pixels = pixels == 1 or is_channels_last(y)
    shape = (n * pixels, (c + 7) // 8) if by_pixels else (n, c, (pixels + 7) // 8)
    return y.new_empty(shape, dtype=torch.uint8)


def accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def keeps_mask(act: Activation, residual: Tensor | None) -> bool:
    """A block's end keeps ReLU's bits; elsewhere the next convolution keeps y anyway."""
    return act.name == "relu" and residual is not None


def gradient_format(
    dy: Tensor, y: Tensor | None, mask: Tensor | None, x: Tensor | None, residual: Tensor | None
) -> torch.memory_format:
    """The order in memory of a backward's dx and dr: the forward's, told by what it saved; dy's own says nothing."""
    if mask is not None and dy.numel() != dy.shape[0] * dy.shape[1]:
        channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}
        return channels_last[dy.dim()] if mask.dim() == 2 else torch.contiguous_format
    return _dense_format(next((t for t in (y, x, residual) if t is not None), dy))


def fake_gradients(
    dy: Tensor, memory_format: torch.memory_format, operands: tuple[Tensor | None, ...], needs: list[bool]
) -> tuple[Tensor, ...]:
    """Shapes of the seven gradients: x's and the residual's in the given order, per-channel and gate as they are."""
    gradients = []
    for index, (operand, needed) in enumerate(zip(operands, needs, strict=True)):
        if not needed:
            gradients.append(nothing(dy))
        elif index in (0, 3):
            gradients.append(torch.empty_like(dy if operand is None else operand, memory_format=memory_format))
        elif operand is None:
            gradients.append(dy.new_empty(dy.shape[1], dtype=accumulation_dtype(dy)))
        else:
            gradients.append(operand.new_empty(operand.shape, dtype=accumulation_dtype(dy)))
    return tuple(gradients)

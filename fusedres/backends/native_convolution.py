"""conv_act in the compiled CPU library: its operators' schemas and fakes, and which form of them a shape takes.

    conv_act_pack(weight, groups, tile) -> its bytes in the kernels' order, (outputs, inputs, rows, columns, n)
    conv_act(x, packed, bias, scale, residual, ...) -> y = act(conv(x, weight) * scale + bias + residual)
    conv_act_(x, packed, bias, scale, residual, ...): y written over the residual
    conv_act_out(x, packed, bias, scale, residual, ..., y): y written into memory that is there
    record_begin(like): until record_end(like) -> recording this thread's kernels are noted and not run
    replay(recording): they are, one after the other, on what then lies where they read

float32 or bfloat16 in channels_last, bias and scale always in float32; sums are in float32 and rounded once. A tile of
1 is the direct form; of 2, 4 or 7, for 3x3 windows of stride 1, Winograd's in float32, which computes that many rows
and columns of y at once with 2.25, 4 or 5.4 times fewer products.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional

from fusedres import build
from fusedres.backends import Convolution, Filter, Geometry, Head, Pack, Request
from fusedres.epilogue import Activation
from fusedres.native_sources import NATIVE

_PANEL = 16  # output channels that weights are padded to
_PACKED_DIMS = 5
_DTYPES = {torch.float32: 0, torch.bfloat16: 2}  # and their numbers in csrc/params.h

# Of winograd_tile, in multiply-adds: a value's two transforms, and reading a float32 weight from memory.
_TRANSFORMS = {2: 8, 4: 8, 7: 15}
_READ = 12
# How fast an instruction set multiplies bf16, where it does; Winograd's products are in fp32.
_SPEEDS = {"avx512_bf16": 2, "amx": 16}

_FILTERED = "Tensor x, Tensor packed, Tensor? bias, Tensor? scale"
_WINDOWS = "int[2] stride, int[2] padding, int[2] dilation, int groups, int act"
SCHEMAS = (
    "conv_act_pack(Tensor weight, int groups, int tile) -> Tensor",
    f"conv_act({_FILTERED}, Tensor? residual, {_WINDOWS}) -> Tensor",
    f"conv_act_({_FILTERED}, Tensor(a!) residual, {_WINDOWS}) -> ()",
    f"conv_act_out({_FILTERED}, Tensor? residual, {_WINDOWS}, Tensor(a!) y) -> ()",
    "max_pool_out(Tensor x, int[2] kernel, int[2] stride, int[2] padding, Tensor(a!) y) -> ()",
    "mean_out(Tensor x, Tensor(a!) y) -> ()",
    "connect_out(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) y) -> ()",
    "record_begin(Tensor like) -> ()",
    "record_end(Tensor like) -> Tensor",
    "replay(Tensor recording) -> ()",
)
_LIBRARY = torch.library.Library("fusedres_native", "FRAGMENT")
for _schema in SCHEMAS:
    _LIBRARY.define(_schema)


def _fake_pack(weight: Tensor, groups: int, tile: int) -> Tensor:
    outputs, inputs, rows, columns = weight.shape
    flat = groups == 1 and columns > 1 and inputs < _PANEL
    if groups > 1 and _is_bundle(inputs, outputs // groups):
        groups = 1
    padded = -(-(outputs // groups) // _PANEL) * _PANEL
    taps, run = (rows, columns * inputs) if flat else (rows * columns, inputs)
    step = 2 if weight.dtype is torch.bfloat16 else 1
    direct = groups * padded * taps * -(-run // step) * step
    transformed = (tile + 2) ** 2 * padded * inputs * step if tile > 1 else 0  # in float32
    room = -(-(direct + transformed) // weight.numel()) * weight.element_size()
    return weight.new_empty((*weight.shape, room), dtype=torch.uint8)


def _fake_conv_act(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act: int,
) -> Tensor:
    kernel = packed.shape[2], packed.shape[3]
    height, width = Geometry.of(stride, padding, dilation).output_size(kernel, *x.shape[2:])
    y = x.new_empty((x.shape[0], height, width, packed.shape[0]))
    return y.permute(0, 3, 1, 2)


def _fake_record_end(like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.uint8)


def _fake_in_place(*arguments: object) -> None:
    pass


for _name, _fake in (
    ("conv_act_pack", _fake_pack),
    ("conv_act", _fake_conv_act),
    ("conv_act_", _fake_in_place),
    ("conv_act_out", _fake_in_place),
    ("max_pool_out", _fake_in_place),
    ("mean_out", _fake_in_place),
    ("connect_out", _fake_in_place),
    ("record_begin", _fake_in_place),
    ("record_end", _fake_record_end),
    ("replay", _fake_in_place),
):
    torch.library.register_fake(f"fusedres_native::{_name}", _fake, lib=_LIBRARY)


def winograd_tile(
    inputs: int,
    outputs: int,
    images: int,
    height: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    *,
    read: int = _READ,
) -> int:
    """The tile with which a 3x3 convolution of stride 1 and one group takes least work; 1: the direct form.

    Winograd's has to save a fifth of it. Counted in fp32 multiply-adds a pair of channels: the products of every tile,
    its transforms, reading the weights once. FUSEDRES_WINOGRAD=0 leaves the direct form alone: the errors of the other
    are up to 2.2 times eager's in fp32. A tile of 7 is for bf16 alone, whose rounding is a hundred times its error.

    Args:
        inputs, outputs: channels.
        height, width: y's.
        read: what it costs to get at a weight.
    """
    if not winograd_is_on():
        return 1
    speed = 1 if dtype is torch.float32 else _SPEEDS.get(instruction_set(dtype), 1)

    def work(tile: int) -> float:
        tiles = images * -(-height // tile) * -(-width // tile)
        if tile == 1:
            return 9 * (tiles / speed + read * dtype.itemsize / torch.float32.itemsize)
        return (tile + 2) ** 2 * (tiles * (1 + _TRANSFORMS[tile] * (1 / inputs + 1 / outputs)) + read)

    best = min(tiles_of(dtype), key=work)
    return best if work(best) <= 0.8 * work(1) else 1


def tiles_of(dtype: torch.dtype) -> tuple[int, ...]:
    """Winograd's."""
    return (2, 4) if dtype is torch.float32 else (2, 4, 7)


def winograd_is_on() -> bool:
    choice = os.environ.get("FUSEDRES_WINOGRAD") or "1"
    if choice not in ("0", "1"):
        raise ValueError(f"FUSEDRES_WINOGRAD must be 0 or 1; got {choice!r}")
    return choice == "1"


@cache
def instruction_set(dtype: torch.dtype) -> str:
    """The variant of the library that serves a dtype."""
    found = build.library(NATIVE)
    assert isinstance(found, build.Library)
    variant = ctypes.CDLL(str(found.path)).fusedres_variant
    variant.restype = ctypes.c_char_p
    return variant(_DTYPES[dtype]).decode()


def forms(weight: Sequence[int], geometry: Geometry, sizes: Sequence[int], dtype: torch.dtype) -> dict[str, Pack]:
    """The direct form, and Winograd's where there is one; first the one that winograd_tile names."""
    outputs, inputs, *kernel = weight
    tiles: Iterable[int] = (1,)
    if geometry == Geometry(padding=geometry.padding) and kernel == [3, 3] and winograd_is_on():
        height, width = geometry.output_size((3, 3), sizes[2], sizes[3])
        rule = winograd_tile(inputs, outputs, sizes[0], height, width, dtype)
        tiles = dict.fromkeys((rule, 1, *tiles_of(dtype)))
    return {form(tile): partial(_pack_for, tile) for tile in tiles}


def form(tile: int) -> str:
    return "direct" if tile == 1 else f"winograd {tile}"


def pack(taps: Filter, geometry: Geometry, sizes: Sequence[int], joins: bool) -> Filter:
    """The weight in the kernels' order, with Winograd's beside it where the sizes make that worth while."""
    by_rule = next(iter(forms(taps.weight.shape, geometry, sizes, taps.weight.dtype).values()))
    return by_rule(taps, geometry, sizes, joins)


def _pack_for(tile: int, taps: Filter, geometry: Geometry, sizes: Sequence[int], joins: bool) -> Filter:
    weight, bias, scale = taps
    packed = torch.ops.fusedres_native.conv_act_pack(weight, geometry.groups, tile)
    return Filter(packed, None if bias is None else bias.float().contiguous(), scale)


def run(
    x: Tensor, taps: Filter, residual: Tensor | None, geometry: Geometry, act: Activation, in_place: bool
) -> Tensor:
    if taps.weight.dim() != _PACKED_DIMS:
        taps = pack(taps, geometry, x.shape, residual is not None)
    outputs, inputs, rows, columns, _ = taps.weight.shape
    if x.shape[1] != inputs * geometry.groups or min(geometry.output_size((rows, columns), *x.shape[2:])) < 1:
        # Nothing for the kernels: eager says what is wrong.
        bias = None if taps.bias is None else taps.bias.to(x.dtype)
        return functional.conv2d(x, x.new_zeros(outputs, inputs, rows, columns), bias, *geometry)
    operators = torch.ops.fusedres_native
    if residual is None or not in_place:
        return operators.conv_act(x, *taps, residual, *geometry, act.code)
    operators.conv_act_(x, *taps, residual, *geometry, act.code)
    return residual


class _Call(partial[None]):
    """One of an operator whose kernels can be recorded."""

    @staticmethod
    def join(calls: Sequence[partial[None]]) -> _Recording:
        return _Recording(calls)


class _Recording:
    """What several calls come to, with no look at operands and no Python between the kernels."""

    def __init__(self, calls: Sequence[partial[None]]) -> None:
        operators, (like, *_) = torch.ops.fusedres_native, calls[0].args
        operators.record_begin(like)
        try:
            for call in calls:
                call()
        finally:
            recording = operators.record_end(like)
        self._calls = calls  # and so the tensors that the kernels point to
        self._replay = partial(operators.replay.default, recording)

    def __call__(self) -> None:
        self._replay()


def prepare(
    x: Tensor, taps: Filter, residual: Tensor | None, geometry: Geometry, act: Activation, y: Tensor
) -> Callable[[], object]:
    operators, arguments = torch.ops.fusedres_native, (x, *taps, residual, *geometry, act.code)
    if residual is y:
        return _Call(operators.conv_act_.default, *arguments)
    return _Call(operators.conv_act_out.default, *arguments, y)


def prepare_max_pool(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], y: Tensor
) -> Callable[[], object]:
    """Without the positions that torch's finds as well."""
    return _Call(torch.ops.fusedres_native.max_pool_out.default, x, kernel, stride, padding, y)


def prepare_mean(x: Tensor, y: Tensor) -> Callable[[], object]:
    return _Call(torch.ops.fusedres_native.mean_out.default, x, y)


def connect(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = weight.new_empty(x.shape[0], weight.shape[0])
    torch.ops.fusedres_native.connect_out(x, weight, bias, y)
    return y


HEAD = Head(frozenset(_DTYPES), prepare_mean, connect)
CONVOLUTION = Convolution(pack, run, forms, prepare, scales=True, max_pool=prepare_max_pool, head=HEAD)


def objection(request: Request) -> str | None:
    """Why the kernels can't serve a request, as one sentence."""
    if request.device != "cpu":
        return f"it has no convolutions for {request.device} tensors"
    if request.compiling:
        return "torch.compile fuses the reference's operations itself"
    if request.wants_gradient and request.op == "conv_act":
        return "its convolutions have no backward; call it under torch.no_grad() or torch.inference_mode()"
    if request.subclass:
        return "x is a tensor subclass, which its operators do not see through"
    if request.dtype not in _DTYPES:
        return f"x is {request.dtype}, and its convolutions are in {' or '.join(map(str, _DTYPES))}; convert it"
    reason = request.disagreement()
    if reason is not None:
        return reason
    inputs, outputs = request.group
    if 0 < outputs < _PANEL and not _is_bundle(inputs, outputs):
        return f"its vectors hold {_PANEL} outputs of one group or several of 2, 4 or 8, and a group here has {outputs}"
    return None


def _is_bundle(inputs: int, outputs: int) -> bool:
    """Whether groups of so many channels fill a vector together."""
    return inputs == outputs and outputs in (2, 4, 8)

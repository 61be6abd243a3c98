"""Triton's kernels on CPU tensors, run by its interpreter: to be imported first in a process with TRITON_INTERPRET=1.

Three things stand in for a GPU: a device of two processors, so that small tensors are cut into few parts, merged two at
a time, the rounding to bfloat16, which the interpreter truncates and hardware does to nearest even, and the product of
bfloat16, whose bits the interpreter would multiply. Every load and store is held to the tensors of its launch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
from triton.tools.tensor_descriptor import TensorDescriptor

from fusedres.backends.triton import BACKEND, apply, launch, operand_objection

assert os.environ.get("TRITON_INTERPRET") == "1", "kernels are bound to the interpreter when they are decorated"

launch.device_of = lambda device: launch.Device("interpreter", 90, 2)
launch.PARTS_AT_ONCE = 2

INTERPRETED = replace(BACKEND, name="interpreted", objection=operand_objection, keys=("CPU",))

# triton.language is patched at every call of every function, which takes most of the time. Once will do.
for _function in (apply.apply.fn, tl.sum.fn):
    interpreter._patch_lang(_function)
interpreter._patch_lang = lambda function: interpreter._LangPatchScope()
interpreter.interpreter_builder.options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)

# Types are worked out anew for every value; most of what time is left goes there.
_types: dict[tuple[Any, ...], dict[str, Any]] = {}
_numpy_types: dict[str, np.dtype] = {}
_new_block_type, _new_tensor, _numpy_type = tl.block_type.__init__, tl.tensor.__init__, interpreter._get_np_dtype


def _known_numpy_type(type: tl.dtype) -> np.dtype:
    if type.name not in _numpy_types:
        _numpy_types[type.name] = _numpy_type(type)
    return _numpy_types[type.name]


def _known_block_type(self: tl.block_type, element_ty: tl.dtype, shape: Any) -> None:
    sizes = (size.value if isinstance(size, tl.constexpr) else size for size in shape)
    key = (element_ty.name, *sizes)
    if key not in _types:
        _new_block_type(self, element_ty, shape)
        _types[key] = self.__dict__
    self.__dict__ = _types[key]


def _tensor_of_known_type(self: tl.tensor, handle: TensorHandle, type: tl.dtype) -> None:
    key = ("tensor", type.name)
    if key not in _types:
        _new_tensor(self, handle, type)
        _types[key] = {name: value for name, value in self.__dict__.items() if name != "handle"}
    self.__dict__.update(_types[key])
    self.handle = handle


interpreter._get_np_dtype = _known_numpy_type
tl.block_type.__init__, tl.tensor.__init__ = _known_block_type, _tensor_of_known_type

_cast = InterpreterBuilder.cast_impl


def _cast_bfloat16(builder: InterpreterBuilder, source: TensorHandle, dtype: tl.dtype) -> TensorHandle:
    before, after = source.dtype.scalar, dtype.scalar
    if tl.bfloat16 not in (before, after):
        return _cast(builder, source, dtype)
    if before == tl.bfloat16:
        wide = (source.data.astype(np.uint32) << 16).view(np.float32)
        return (
            _cast(builder, TensorHandle(wide, tl.float32), dtype) if after != tl.float32 else TensorHandle(wide, after)
        )
    narrow = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.uint16)
    return TensorHandle(narrow.numpy(), after)


InterpreterBuilder.cast_impl = _cast_bfloat16

_dot = InterpreterBuilder.create_dot


def _dot_bfloat16(builder: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
    wide = [_cast_bfloat16(builder, t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b)]
    return _dot(builder, *wide, *rest)


InterpreterBuilder.create_dot = _dot_bfloat16

_allowed: list[tuple[int, int]] = []  # first byte and end of the tensors of the launch under way
_launch, _load, _store = launch.launch, InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store


def _tensors(arguments: Iterable[Any]) -> Iterator[torch.Tensor]:
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, TensorDescriptor):
            yield argument.base
        elif isinstance(argument, tuple):
            yield from _tensors(argument)


def _launch_watched(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], *rest: Any) -> None:
    tensors = list(_tensors(arguments))
    spans = [sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) + 1 for t in tensors]
    _allowed[:] = [
        (t.data_ptr(), t.data_ptr() + span * t.element_size()) for t, span in zip(tensors, spans, strict=True)
    ]
    _launch(kernel, grid, arguments, *rest)


def _require_allowed(pointers: TensorHandle, mask: TensorHandle) -> None:
    touched = np.broadcast_to(pointers.data, np.broadcast_shapes(pointers.data.shape, mask.data.shape))[mask.data]
    within = np.zeros(touched.shape, bool)
    for first, end in _allowed:
        within |= (touched >= first) & (touched < end)
    assert within.all(), "a kernel touched memory outside the tensors of its launch"


def _load_watched(
    builder: InterpreterBuilder, pointers: TensorHandle, mask: TensorHandle, *rest: Any, **by_name: Any
) -> TensorHandle:
    _require_allowed(pointers, mask)
    return _load(builder, pointers, mask, *rest, **by_name)


def _store_watched(
    builder: InterpreterBuilder, pointers: TensorHandle, value: TensorHandle, mask: TensorHandle, *rest: Any
) -> None:
    _require_allowed(pointers, mask)
    _store(builder, pointers, value, mask, *rest)


launch.launch = _launch_watched
InterpreterBuilder.create_masked_load = _load_watched
InterpreterBuilder.create_masked_store = _store_watched

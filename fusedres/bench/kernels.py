"""Which operators a step calls and what they have to move, counted as they run: on any device, with no clock.

Bytes are algorithmic, as the roofline's are: an operand is read or written once a pass. Two passes are those of batch
norms over what they take statistics of, and of a convolution's backward over dy. What kernels find on chip, or in
another operand (the CPU's leave a large y for x), is counted all the same.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fusedres import fusion
from fusedres.backends import Statistics
from fusedres.bench.work import Inference, Training, Work


@dataclass
class Kernel:
    """One operator's calls in a step, and the bytes that all of them moved."""

    calls: int = 0
    bytes: int = 0


def of_model(network: nn.Module, work: Work) -> dict[str, dict[str, Kernel]]:
    """The forward and backward of a copy, channels_last, as it is and fused."""
    found = {}
    for name in ("eager", "fused"):
        model = copy.deepcopy(network).to(work.device).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        if name == "fused":
            fusion.fuse(model)
        images = work.images().contiguous(memory_format=torch.channels_last)
        step = Training(model, images, work).backward if work.training else Inference(model.eval(), images, work)
        found[name] = count(step)
    return found


def count(step: Callable[[], object]) -> dict[str, Kernel]:
    """What `step` calls, by the operators' names, the one that moves most first; views and bookkeeping are left out."""
    with _Counting() as counting:
        step()
    return dict(sorted(counting.kernels.items(), key=lambda item: -item[1].bytes))


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.kernels: dict[str, Kernel] = defaultdict(Kernel)

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        moved = _moved(function._schema, args, kwargs or {}, result)
        if moved:
            kernel = self.kernels[str(function.overloadpacket)]
            kernel.calls += 1
            kernel.bytes += moved
        return result


def _moved(schema: torch.FunctionSchema, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> int:
    given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | dict(kwargs)
    writes = {
        argument.name: argument.alias_info is not None and argument.alias_info.is_write for argument in schema.arguments
    }
    aliased = any(returned.alias_info is not None for returned in schema.returns)
    allocates = "empty" in schema.name or not any(map(_tensors, given.values()))
    if allocates or (aliased and not any(writes.values())):  # or a view
        return 0
    passes = _passes(schema.name, given)
    size = 0
    for name, value in given.items():
        size += _size(value) * (passes.get(name, 1) * (not _is_overwritten(schema.name, name)) + writes[name])
    return size if aliased else size + _size(result)


def _is_overwritten(operator: str, argument: str) -> bool:
    """Whether the argument is written without being read."""
    return argument == "out" or (operator in ("aten::copy_", "aten::zero_", "aten::fill_") and argument == "self")


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _size(value: Any) -> int:
    return sum(t.numel() * t.itemsize for t in _tensors(value))


def _passes(operator: str, given: Mapping[str, Any]) -> dict[str, int]:
    """How often the arguments are read that are not read once."""
    namespace, _, name = operator.partition("::")
    if namespace.startswith("fusedres_") and name.startswith("bn_act"):
        of_batch = [given.get(source) == Statistics.BATCH.value for source in ("statistics", "statistics_r")]
        taken = [operand for operand, batch in zip(("x", "residual"), of_batch, strict=True) if batch]
        if name.endswith("_forward"):
            return dict.fromkeys(taken, 2)
        return dict.fromkeys(("dy", "y", "mask", "choice", *taken), 2)
    if name in ("native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm", "miopen_batch_norm"):
        return {"input": 2 if given["training"] else 1}
    if name in ("native_batch_norm_backward", "cudnn_batch_norm_backward"):
        return dict.fromkeys(("grad_out", "grad_output", "input"), 2)
    if name == "convolution_backward":
        return dict.fromkeys(("grad_output", "weight"), sum(given["output_mask"][:2]))
    return {}

"""What an optimized module runs: a plan of its forward, made at its first call and again whenever it changed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fusedres import dispatch
from fusedres.inference import graphs
from fusedres.inference.folding import CASTS
from fusedres.inference.plan import Plan
from fusedres.inference.program import Program, refuse_capture
from fusedres.inference.steps import Mode
from fusedres.residual import ambient_objection

__all__ = ["forget", "graph", "held", "hold", "latest", "mode_of", "serve"]

# Beside the modules and not in them, so that copies, pickles and state_dicts know nothing of it.
_programs: WeakKeyDictionary[nn.Module, dict[Mode, Program]] = WeakKeyDictionary()
_graphed: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # by module, the most images of a graph
_making = threading.RLock()


def serve(module: nn.Module, x: Tensor, own: Callable[[Tensor], Tensor]) -> Tensor:
    """The module's output by its plan; by its own forward in training, with gradients, and while it is traced."""
    if torch.compiler.is_compiling():
        return own(x)
    mode = _objection(module, x) or mode_of(module, x)
    if dispatch.recorder is None:
        return own(x) if isinstance(mode, str) else _run(module, mode, x)
    with dispatch.recorder.inside(module, mode if isinstance(mode, str) else None):
        return own(x) if isinstance(mode, str) else _run(module, mode, x)


def _run(module: nn.Module, mode: Mode, x: Tensor) -> Tensor:
    found = _programs.get(module, _NOTHING).get(mode)
    if found is None or not found.watch.is_unchanged(module):
        return _make(module, mode, x)
    return found(x) if found.graphs is None else found.graphs(x)


_NOTHING: dict[Mode, Program] = {}


def _make(module: nn.Module, mode: Mode, x: Tensor) -> Tensor:
    with _making:
        found = _programs.get(module, _NOTHING).get(mode)
        if found is not None and found.watch.is_unchanged(module):  # another thread was faster
            return _run(module, mode, x)
        refuse_capture()
        program = Program(module, mode)
        y = program.bind(x)
        if module in _graphed and graphs.serve(mode.device):
            y = program.capture(x, _graphed[module])
        _programs[module] = {**_programs.get(module, _NOTHING), mode: program}
        return y


def latest(module: nn.Module) -> Plan | None:
    """The plan of a module that was made last."""
    programs = _programs.get(module)
    return next(reversed(programs.values())).latest if programs else None


def graph(module: nn.Module, largest: int) -> None:
    """Let the plans of a module on a CUDA device be captured, for up to `largest` images."""
    _graphed[module] = largest


def forget(module: nn.Module) -> None:
    """Drop the plans of a module."""
    _programs.pop(module, None)
    _graphed.pop(module, None)


Held = tuple[dict[Mode, Program] | None, int | None]


def held(module: nn.Module) -> Held:
    """The plans of a module, and how many images its graphs are for."""
    return _programs.get(module), _graphed.get(module)


def hold(module: nn.Module, held: Held) -> None:
    """Give a module back what it held, and drop the rest."""
    forget(module)
    programs, largest = held
    if programs is not None:
        _programs[module] = programs
    if largest is not None:
        _graphed[module] = largest


def _objection(module: nn.Module, x: Tensor) -> str | None:
    """Why this call is left to the module's own forward."""
    if module.training:
        return "it is in training mode"
    if torch.is_grad_enabled():
        return "gradients are enabled; call it under torch.no_grad() or torch.inference_mode()"
    if torch._C._len_torch_dispatch_stack():
        return "a dispatch mode is active"
    return ambient_objection(module, x)


def mode_of(module: nn.Module, x: Tensor) -> Mode | str:
    """What a plan of the module for inputs such as x is made for, or why there can be none."""
    for weight in module.parameters():
        if weight.dim() == 4:
            break
    else:
        return "it has no convolution"
    device = weight.device
    if not torch.amp.is_autocast_available(device.type):
        return f"the parameters are on {device}; move the model to a device that computes, such as the CPU"
    if x.device != device:
        return f"the input is on {x.device} and the parameters on {device}"
    autocast = torch.is_autocast_enabled(device.type)
    if x.dtype not in (CASTS if autocast else (weight.dtype,)):
        return f"the input is {x.dtype} and the parameters are {weight.dtype}"
    dtype = torch.get_autocast_dtype(device.type) if autocast else weight.dtype
    return Mode(device, dtype, autocast, dispatch._forced)

"""fusedres: residual blocks of PyTorch, fused and drop-in."""

import os as _os

from fusedres import dispatch as _dispatch
from fusedres import models, ops
from fusedres._version import __version__
from fusedres.blocks import BasicBlock, Bottleneck
from fusedres.dispatch import use_backend
from fusedres.explanation import explain
from fusedres.families import register_family
from fusedres.fusion import fuse, unfuse
from fusedres.memory import set_memory
from fusedres.optimization import optimize, unoptimize
from fusedres.tuning import tune
from fusedres.verification import verify

if _os.environ.get("FUSEDRES_BACKEND"):
    _dispatch.force(_os.environ["FUSEDRES_BACKEND"])

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "__version__",
    "explain",
    "fuse",
    "models",
    "ops",
    "optimize",
    "register_family",
    "set_memory",
    "tune",
    "unfuse",
    "unoptimize",
    "use_backend",
    "verify",
]

"""fusedres: fused residual blocks for PyTorch, drop-in."""

from fusedres import ops
from fusedres._version import __version__
from fusedres.dispatch import use_backend

__all__ = ["__version__", "ops", "use_backend"]

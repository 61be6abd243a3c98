"""The library's operations. Each is a function here, and a schema with fakes and autograd for every kernel backend."""

from fusedres import dispatch
from fusedres.backends import Affine, Backend, Norm
from fusedres.ops import kernels
from fusedres.ops.affine_act import SPEC as AFFINE_ACT
from fusedres.ops.affine_act import affine_act
from fusedres.ops.bn_act import SPEC as BN_ACT
from fusedres.ops.bn_act import bn_act
from fusedres.ops.bn_act_pool import SPEC as BN_ACT_POOL
from fusedres.ops.bn_act_pool import bn_act_pool
from fusedres.ops.conv_act import conv_act

__all__ = [
    "Affine",
    "Norm",
    "affine_act",
    "bn_act",
    "bn_act_pool",
    "conv_act",
    "register_backend",
    "unregister_backend",
]


_SPECS = (AFFINE_ACT, BN_ACT, BN_ACT_POOL)
for _backend in dispatch.ORDER:
    kernels.bind(_backend, _SPECS)


def register_backend(backend: Backend) -> None:
    """Put a backend first in the order; its kernels get the library's schemas, fakes and autograd."""
    kernels.register(backend, _SPECS)


def unregister_backend(backend: Backend) -> None:
    """Take a backend out again."""
    kernels.unregister(backend)

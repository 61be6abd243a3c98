"""The activations of `fusedres.epilogue` for tiles of fp32 or fp64, chosen by code when a kernel is compiled.

Selects, not max() and not a product: eager keeps NaN, passes the gradient on at NaN, and a masked NaN becomes 0.
"""

import triton
import triton.language as tl

from fusedres.epilogue import find

IDENTITY = tl.constexpr(find("identity").code)
RELU = tl.constexpr(find("relu").code)
RELU6 = tl.constexpr(find("relu6").code)
LEAKY_RELU = tl.constexpr(find("leaky_relu").code)
SILU = tl.constexpr(find("silu").code)
GELU = tl.constexpr(find("gelu").code)
GELU_TANH = tl.constexpr(find("gelu_tanh").code)
HARDSWISH = tl.constexpr(find("hardswish").code)


@triton.jit
def relu(z):
    return tl.where(z <= 0, 0.0, z)


@triton.jit
def relu_gradient(y, dy):
    return tl.where(y <= 0, 0.0, dy)


@triton.jit
def relu6(z):
    return tl.where(z >= 6, 6.0, relu(z))


@triton.jit
def relu6_gradient(y, dy):
    return tl.where(y >= 6, 0.0, relu_gradient(y, dy))


@triton.jit
def leaky_relu_gradient(y, dy):
    return tl.where(y > 0, dy, dy * 0.01)


@triton.jit
def sigmoid(z):
    return 1 / (1 + tl.exp(-z))


@triton.jit
def silu_gradient(z, dy):
    s = sigmoid(z)
    return dy * (s * (1 + z * (1 - s)))


@triton.jit
def normal_cdf(z):
    return 0.5 * (1 + tl.erf(z * 0.7071067811865476))


@triton.jit
def gelu_gradient(z, dy):
    density = tl.exp(z * z * -0.5) * 0.3989422804014327
    return dy * (normal_cdf(z) + z * density)


@triton.jit
def gelu_tanh_gate(z):
    """0.5 * (1 + tanh(u)) = sigmoid(2 u), which does not cancel for negative u."""
    return sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))


@triton.jit
def gelu_tanh_gradient(z, dy):
    s = gelu_tanh_gate(z)
    slope = 1.5957691216057308 * (1 + 0.134145 * z * z)
    return dy * (s + z * s * (1 - s) * slope)


@triton.jit
def hardswish_gradient(z, dy):
    inner = tl.where(z < 3, z / 3 + 0.5, 1.0)
    return dy * tl.where(z <= -3, 0.0, inner)


@triton.jit
def activation(z, ACT: tl.constexpr):
    """act(z)."""
    if ACT == RELU:
        z = relu(z)
    elif ACT == RELU6:
        z = relu6(z)
    elif ACT == LEAKY_RELU:
        z = leaky_relu_gradient(z, z)
    elif ACT == SILU:
        z = z / (1 + tl.exp(-z))
    elif ACT == GELU:
        z = z * normal_cdf(z)
    elif ACT == GELU_TANH:
        z = z * gelu_tanh_gate(z)
    elif ACT == HARDSWISH:
        z = z * relu6(z + 3) / 6
    else:
        tl.static_assert(ACT == IDENTITY, "an activation without a formula")
    return z


@triton.jit
def activation_gradient(t, dy, ACT: tl.constexpr):
    """dy * act'(z), from the output t = y where the catalogue says `from_output`, else from t = z."""
    if ACT == RELU:
        dy = relu_gradient(t, dy)
    elif ACT == RELU6:
        dy = relu6_gradient(t, dy)
    elif ACT == LEAKY_RELU:
        dy = leaky_relu_gradient(t, dy)
    elif ACT == SILU:
        dy = silu_gradient(t, dy)
    elif ACT == GELU:
        dy = gelu_gradient(t, dy)
    elif ACT == GELU_TANH:
        dy = gelu_tanh_gradient(t, dy)
    elif ACT == HARDSWISH:
        dy = hardswish_gradient(t, dy)
    else:
        tl.static_assert(ACT == IDENTITY, "an activation without a derivative")
    return dy

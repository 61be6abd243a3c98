"""What a kernel reads per channel: the affine map of an operand and the gate."""

import triton
import triton.language as tl


@triton.jit
def load_channels(ptr, first_channel, channels, default, ACC: tl.constexpr, BLOCK_C: tl.constexpr):
    """(BLOCK_C,): a tensor's values of these channels; `default` where there is no tensor."""
    if ptr is None:
        values = tl.full((BLOCK_C,), default, ACC)
    else:
        channel = first_channel + tl.arange(0, BLOCK_C)
        values = tl.load(ptr + channel, mask=channel < channels, other=default).to(ACC)
    return values


@triton.jit
def load_affine(
    centre_ptr,
    weight_ptr,
    bias_ptr,
    first_channel,
    channels,
    NORM: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """(t - mean) * scale + shift as three (BLOCK_C,): the mean first, t * scale + shift cancels.

    centre: (C,) means, or with NORM the (3, C) statistics: the mean's high part, its remainder, which goes into the
    shift, and 1 / sqrt(var + eps). -0 stands for an absent shift: t + -0 is t for every t.
    """
    mean = load_channels(centre_ptr, first_channel, channels, 0.0, ACC, BLOCK_C)
    scale = load_channels(weight_ptr, first_channel, channels, 1.0, ACC, BLOCK_C)
    shift = load_channels(bias_ptr, first_channel, channels, -0.0, ACC, BLOCK_C)
    if NORM:
        low, rstd = load_remainder(centre_ptr, first_channel, channels, NORM, ACC, BLOCK_C)
        scale *= rstd
        shift -= low * scale
    return mean, scale, shift


@triton.jit
def load_remainder(centre_ptr, first_channel, channels, NORM: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr):
    """The mean's remainder and 1 / sqrt(var + eps) as two (BLOCK_C,); 0 and 1 without statistics."""
    if NORM:
        low = load_channels(centre_ptr + channels, first_channel, channels, 0.0, ACC, BLOCK_C)
        rstd = load_channels(centre_ptr + 2 * channels, first_channel, channels, 1.0, ACC, BLOCK_C)
    else:
        low = tl.full((BLOCK_C,), 0.0, ACC)
        rstd = tl.full((BLOCK_C,), 1.0, ACC)
    return low, rstd


@triton.jit
def load_gate(gate_ptr, gate_strides, place, ACC: tl.constexpr, BLOCK_C: tl.constexpr):
    """(BLOCK_C,): the gate of a tile's image and channels."""
    image, _, first_channel, _, channels = place
    channel = first_channel + tl.arange(0, BLOCK_C)
    offsets = image * gate_strides[0] + channel * gate_strides[1]
    return tl.load(gate_ptr + offsets, mask=channel < channels, other=0.0).to(ACC)

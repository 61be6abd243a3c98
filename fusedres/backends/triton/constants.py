"""What a kernel reads per channel: the affine map of an operand and the gate."""

# What is decorated is Triton's language, not Python.
# pyright: reportAttributeAccessIssue=false

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
def load_affine(operand, eps, first_channel, channels, CUT: tl.constexpr):
    """(t - mean) * scale + shift as three (block_c,): the mean first, t * scale + shift cancels.

    The mean's remainder goes into the shift. -0 stands for an absent shift: t + -0 is t for every t.
    """
    mean = load_channels(operand.mean, first_channel, channels, 0.0, CUT.acc, CUT.block_c)
    scale = load_channels(operand.weight, first_channel, channels, 1.0, CUT.acc, CUT.block_c)
    shift = load_channels(operand.bias, first_channel, channels, -0.0, CUT.acc, CUT.block_c)
    if operand.var is not None:
        scale *= load_running_rstd(operand, eps, first_channel, channels, CUT)
    elif operand.stats is not None:
        mean = load_channels(operand.stats, first_channel, channels, 0.0, CUT.acc, CUT.block_c)
        low, rstd = load_remainder(operand.stats, first_channel, channels, CUT.acc, CUT.block_c)
        scale *= rstd
        shift -= low * scale
    return mean, scale, shift


@triton.jit
def load_remainder(stats_ptr, first_channel, channels, ACC: tl.constexpr, BLOCK_C: tl.constexpr):
    """The mean's remainder and 1 / sqrt(var + eps) as two (BLOCK_C,); 0 and 1 without statistics."""
    if stats_ptr is None:
        low = tl.full((BLOCK_C,), 0.0, ACC)
        rstd = tl.full((BLOCK_C,), 1.0, ACC)
    else:
        low = load_channels(stats_ptr + channels, first_channel, channels, 0.0, ACC, BLOCK_C)
        rstd = load_channels(stats_ptr + 2 * channels, first_channel, channels, 1.0, ACC, BLOCK_C)
    return low, rstd


@triton.jit
def load_running_rstd(operand, eps, first_channel, channels, CUT: tl.constexpr):
    """1 / sqrt(var + eps) of running statistics."""
    var = load_channels(operand.var, first_channel, channels, 1.0, CUT.acc, CUT.block_c)
    var += tl.full((CUT.block_c,), eps, CUT.acc)
    if CUT.acc == tl.float32:
        # Without _rn they are approximations.
        rstd = tl.div_rn(tl.full((CUT.block_c,), 1.0, tl.float32), tl.sqrt_rn(var))
    else:
        rstd = 1 / tl.sqrt(var)
    return rstd


@triton.jit
def keep_statistics(operand, eps, first_channel, channels, CUT: tl.constexpr):
    """Leave the running statistics as the (3, C) that a backward takes; a running mean has no remainder."""
    if operand.var is not None:
        channel = first_channel + tl.arange(0, CUT.block_c)
        exists = channel < channels
        mean = load_channels(operand.mean, first_channel, channels, 0.0, CUT.acc, CUT.block_c)
        rstd = load_running_rstd(operand, eps, first_channel, channels, CUT)
        tl.store(operand.stats + channel, mean, mask=exists)
        tl.store(operand.stats + channels + channel, tl.full((CUT.block_c,), 0.0, CUT.acc), mask=exists)
        tl.store(operand.stats + 2 * channels + channel, rstd, mask=exists)


@triton.jit
def load_gate(gate, place, CUT: tl.constexpr):
    """(block_c,): the gate of a tile's image and channels."""
    channel = place.first_channel + tl.arange(0, CUT.block_c)
    offsets = place.image * gate.image_stride + channel * gate.channel_stride
    return tl.load(gate.data + offsets, mask=channel < place.channels, other=0.0).to(CUT.acc)

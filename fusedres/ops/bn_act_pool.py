"""bn_act_pool: y = maxpool(act(BN(x))), the stem of a network, its full-resolution activation never stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedres import dispatch
from fusedres.backends import Norm, Statistics, Window
from fusedres.epilogue import Activation
from fusedres.ops import contract, gradients, kernels

# In `choice`: no gradient passes this window, because the activation is flat at its largest value.
PASSES_NOTHING = 255


def bn_act_pool(
    x: Tensor,
    norm: Norm,
    *,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    act: str | Activation = "relu",
) -> Tensor:
    """Batch norm, activate, take the largest value of every window.

        y = maxpool(act(BN(x)))

    The first of equal values is chosen, and a NaN before any other value, as `torch.nn.functional.max_pool2d` does.
    Differentiable, to any order, in x, weight and bias; the running statistics move in place.

    Args:
        x: (N, C, H, W); y has its dtype.
        norm: x's batch norm.
        kernel_size, stride, padding: those of `torch.nn.functional.max_pool2d`; rows before columns.
        act: a name of the catalogue, `fusedres.epilogue.CATALOGUE`.

    >>> x = torch.arange(16.0).reshape(1, 1, 4, 4)
    >>> bn_act_pool(x, Norm(training=True), kernel_size=2).round(decimals=1)
    tensor([[[[0.0000, 0.0000],
              [1.2000, 1.6000]]]])
    """
    activation = contract.activation(act)
    contract.check_tensors(x, None, None)
    contract.check_norm(x, "norm", norm, x)
    window = contract.window(x, kernel_size, stride, padding)
    source = (Statistics.BATCH if norm.training else Statistics.RUNNING).value
    request = contract.request(
        "bn_act_pool",
        x,
        None,
        None,
        activation,
        contract.parameter_dtype(norm),
        source,
        window_positions=window.positions(),
    )
    backend = dispatch.choose(request)
    if "bn_act_pool" in backend.plain:
        return backend.plain["bn_act_pool"](x, norm, window, activation)
    weight, bias, mean, var, _, momentum, eps = norm
    run = kernels.of(backend, "bn_act_pool")
    y = run(x, weight, bias, mean, var, source, momentum, eps, *window, activation.code)
    # A compiled graph writes the statistics back itself.
    if norm.training and not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([t for t in (mean, var) if t is not None])
    return y


class BnActPool(torch.autograd.Function):
    """The op's gradients out of a backend's two kernels."""

    @staticmethod
    def forward(ctx: Any, operators: kernels.Kernels, *arguments: Any) -> Tensor:
        x, weight, bias, _, _, source, _, eps, *window, _ = arguments
        y, stats, choice = operators.forward(*arguments, any(ctx.needs_input_grad))
        ctx.operators, ctx.source, ctx.eps, ctx.window = operators, source, eps, Window(*window)
        ctx.save_for_backward(x, weight, bias, stats, choice)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[1:4]
        run = _backward_again if torch.is_grad_enabled() else _backward_once
        return None, *run(ctx, dy, needs), *[None] * 9


def _backward_once(ctx: Any, dy: Tensor, needs: tuple[bool, ...]) -> list[Tensor | None]:
    x, weight, bias, stats, choice = ctx.saved_tensors
    found = ctx.operators.backward(dy, choice, x, weight, stats, ctx.source, *ctx.window, needs)
    dtypes = [None if t is None else t.dtype for t in (x, weight, bias)]
    return [gradients.cast(d, dtype) if needed else None for d, dtype, needed in zip(found, dtypes, needs, strict=True)]


def _backward_again(ctx: Any, dy: Tensor, needs: tuple[bool, ...]) -> list[Tensor | None]:
    """create_graph: the pre-activation rerun, and of it what the forward chose."""
    x, weight, bias, stats, choice = ctx.saved_tensors
    passes = choice != PASSES_NOTHING
    pixel = torch.where(passes, chosen_pixel(choice, ctx.window, x.shape[3]), 0).flatten(2)

    def formula(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        z = gradients.normalise_again(x, weight, bias, stats, ctx.source, ctx.eps)
        return gradients.apply_slope(z.flatten(2).gather(2, pixel).view(choice.shape), passes)

    return gradients.differentiable(formula, (x, weight, bias), needs, dy)


def chosen_pixel(choice: Tensor, window: Window, width: int) -> Tensor:
    """Which pixel of its (H, W) plane each window chose, as `max_pool2d`'s own indices have it."""
    position = choice.long()
    row, column = (
        torch.arange(outputs, device=choice.device) * stride - padding
        for outputs, stride, padding in zip(choice.shape[2:], window.stride, window.padding, strict=True)
    )
    kernel_width = window.kernel_size[1]
    return (row[:, None] + position // kernel_width) * width + column + position % kernel_width


def _fake_forward(
    x: Tensor, weight, bias, mean, var, source, momentum, eps, kernel_size, stride, padding, act, keep_choice
) -> tuple[Tensor, ...]:
    sizes = (*x.shape[:2], *Window(kernel_size, stride, padding).output_size(*x.shape[2:]))
    order = torch.channels_last if kernels.is_channels_last(kernels.empty_output(x)) else torch.contiguous_format
    y = torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=order)
    stats = x.new_empty((3, x.shape[1]), dtype=kernels.accumulation_dtype(x))
    return y, stats, torch.empty_like(y, dtype=torch.uint8) if keep_choice else y.new_empty(0, dtype=torch.uint8)


def _fake_backward(
    dy, choice, x, weight, stats, source, kernel_size, stride, padding, needs
) -> tuple[Tensor, Tensor, Tensor]:
    def per_channel(needed: bool) -> Tensor:
        return stats.new_empty(x.shape[1] if needed else 0)

    need_x, need_weight, need_bias = needs
    dx = kernels.empty_output(x) if need_x else kernels.nothing(x)
    return dx, per_channel(need_weight), per_channel(need_bias)


_WINDOW = "int[2] kernel_size, int[2] stride, int[2] padding"
SPEC = kernels.Spec(
    name="bn_act_pool",
    arguments=(
        "Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
        f"int statistics, float momentum, float eps, {_WINDOW}, int act"
    ),
    backward_arguments=f"Tensor dy, Tensor choice, Tensor x, Tensor? weight, Tensor stats, int statistics, {_WINDOW}",
    # stats: (3, C): the mean's high part, its remainder, 1 / sqrt(var + eps)
    # choice: one byte an element of y, in y's memory order: the position that was chosen, or PASSES_NOTHING
    results="Tensor y, Tensor stats, Tensor choice",
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    function=BnActPool,
    gradients=3,
    kept="choice",
)

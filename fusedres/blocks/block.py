"""What the blocks share: how a call runs, how a shortcut is built, and checkpoints that load both ways."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fusedres.memo import forget
from fusedres.residual import Residual, run

NormLayer = Callable[[int], nn.Module]


class Block(nn.Module):
    """A residual block: ordinary children, their description, and the eager path in the original's own words."""

    residual: Residual
    _residual_of_shortcut: Residual

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "residual" in cls.__dict__:
            cls._residual_of_shortcut = replace(cls.residual, shortcut="shortcut")

    @abstractmethod
    def eager_forward(self, x: Tensor) -> Tensor:
        """The forward of the original class."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self.eager_forward(x)
        residual = self.residual if self._modules.get("shortcut") is None else self._residual_of_shortcut
        return run(self, residual, x, self.eager_forward)

    def __reduce_ex__(self, protocol: Any) -> Any:
        forget(self)
        return super().__reduce_ex__(protocol)

    def zero_init_last(self) -> None:
        """Start the last norm's weight at zero, so that the block begins as its shortcut."""
        weight = self.get_submodule(self.residual.stages[-1].norm).weight
        if weight is not None:
            nn.init.zeros_(weight)  # pyright: ignore[reportArgumentType]

    def _set_shortcut(
        self, downsample: nn.Module | None, inplanes: int, outplanes: int, stride: int, norm_layer: NormLayer
    ) -> None:
        """A projection handed in is `downsample`; one that the shapes demand is built here, as `shortcut`."""
        self.downsample = downsample
        self.shortcut = None
        if downsample is None and (stride != 1 or inplanes != outplanes):
            self.shortcut = nn.Sequential(conv1x1(inplanes, outplanes, stride), norm_layer(outplanes))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A projection loads under either of its names."""
        own, other = ("downsample", "shortcut") if self._modules.get("shortcut") is None else ("shortcut", "downsample")
        if getattr(self, own) is not None and not any(key.startswith(f"{prefix}{own}.") for key in state_dict):
            for key in [key for key in state_dict if key.startswith(f"{prefix}{other}.")]:
                state_dict[f"{prefix}{own}.{key.removeprefix(f'{prefix}{other}.')}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


def conv3x3(inplanes: int, planes: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inplanes, planes, 3, stride, dilation, dilation, groups, bias=False)


def conv1x1(inplanes: int, planes: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inplanes, planes, 1, stride, bias=False)


def one_of(**aliases: int | None) -> int:
    """The value given under exactly one of its names."""
    given = {name: value for name, value in aliases.items() if value is not None}
    if len(given) != 1:
        raise TypeError(f"pass exactly one of {', '.join(aliases)}; got {', '.join(given) or 'none'}")
    return next(iter(given.values()))

"""ResNets of fused blocks, with torchvision's structure, keys and initialisation.

A state_dict of torchvision's model of the same name loads strictly, and the other way round.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fusedres.blocks import BasicBlock, Bottleneck
from fusedres.blocks.block import NormLayer, conv1x1
from fusedres.residual import Residual, Stage, run

__all__ = [
    "ResNet",
    "cifar_resnet18",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "wide_resnet50_2",
]

_STEM = Residual((Stage("conv1", "bn1", "relu", after_act=("maxpool",)),))


class ResNet(nn.Module):
    """Stem, four layers of blocks, average pool, linear.

    Args:
        block: BasicBlock, Bottleneck, or any class of their signature.
        layers: blocks per layer.
        zero_init_residual: start each block's last norm at zero, so that the block begins as its shortcut.
        groups, width_per_group: ResNeXt and Wide ResNet.
        replace_stride_with_dilation: for layers 2 to 4, whether dilation stands for the stride.
        norm_layer: a function of the channel count; nn.BatchNorm2d if None.
        stem: "imagenet" is a 7x7 convolution of stride 2 and a max-pool; "cifar" a 3x3 of stride 1.
    """

    if TYPE_CHECKING:  # torch.jit.script would read them, and does not know the name
        layer1: nn.Sequential
        layer2: nn.Sequential
        layer3: nn.Sequential
        layer4: nn.Sequential

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] = (False, False, False),
        norm_layer: NormLayer | None = None,
        *,
        stem: Literal["imagenet", "cifar"] = "imagenet",
    ) -> None:
        super().__init__()
        if stem not in ("imagenet", "cifar"):
            raise ValueError(f"stem must be 'imagenet' or 'cifar', got {stem!r}")
        norm_layer = norm_layer or nn.BatchNorm2d
        imagenet = stem == "imagenet"
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False) if imagenet else nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = norm_layer(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if imagenet else nn.Identity()

        inplanes, dilation = 64, 1
        dilated = (False, *replace_stride_with_dilation)
        for index, (count, dilate) in enumerate(zip(layers, dilated, strict=True)):
            planes, stride = 64 * 2**index, 1 if index == 0 else 2
            block_dilation = dilation
            if dilate:
                dilation, stride = dilation * stride, 1
            blocks = []
            for position in range(count):
                first = position == 0
                blocks.append(
                    block(
                        inplanes,
                        planes,
                        stride if first else 1,
                        _projection(inplanes, planes * block.expansion, stride, norm_layer) if first else None,
                        groups,
                        width_per_group,
                        block_dilation if first else dilation,
                        norm_layer,
                    )
                )
                inplanes = planes * block.expansion
            self.add_module(f"layer{index + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(inplanes, num_classes)
        _initialise(self, zero_init_residual)

    def _eager_stem(self, x: Tensor) -> Tensor:
        return self.maxpool(self.relu(self.bn1(self.conv1(x))))

    def forward(self, x: Tensor) -> Tensor:
        x = self._eager_stem(x) if torch.jit.is_scripting() else run(self, _STEM, x, self._eager_stem)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _projection(inplanes: int, outplanes: int, stride: int, norm_layer: NormLayer) -> nn.Sequential | None:
    if stride == 1 and inplanes == outplanes:
        return None
    return nn.Sequential(conv1x1(inplanes, outplanes, stride), norm_layer(outplanes))


def _initialise(model: nn.Module, zero_init_residual: bool) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm) and module.affine:
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    if zero_init_residual:
        for module in model.modules():
            if isinstance(module, BasicBlock | Bottleneck):
                module.zero_init_last()


def resnet18(num_classes: int = 1000, **options: Any) -> ResNet:
    """ResNet-18; `options` are ResNet's."""
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes, **options)


def resnet34(num_classes: int = 1000, **options: Any) -> ResNet:
    """ResNet-34."""
    return ResNet(BasicBlock, (3, 4, 6, 3), num_classes, **options)


def resnet50(num_classes: int = 1000, **options: Any) -> ResNet:
    """ResNet-50, the stride on the 3x3 convolutions."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, **options)


def resnet101(num_classes: int = 1000, **options: Any) -> ResNet:
    """ResNet-101."""
    return ResNet(Bottleneck, (3, 4, 23, 3), num_classes, **options)


def resnet152(num_classes: int = 1000, **options: Any) -> ResNet:
    """ResNet-152."""
    return ResNet(Bottleneck, (3, 8, 36, 3), num_classes, **options)


def resnext50_32x4d(num_classes: int = 1000, **options: Any) -> ResNet:
    """ResNeXt-50, 32 groups of width 4."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, groups=32, width_per_group=4, **options)


def wide_resnet50_2(num_classes: int = 1000, **options: Any) -> ResNet:
    """ResNet-50 with 3x3 convolutions twice as wide."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, width_per_group=128, **options)


def cifar_resnet18(num_classes: int = 10, **options: Any) -> ResNet:
    """ResNet-18 for 32 px images: 3x3 stem of stride 1, no max-pool."""
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes, stem="cifar", **options)

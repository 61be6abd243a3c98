"""Bottleneck: 1x1 reduction, 3x3, 1x1 expansion and a shortcut (ResNet-50 and deeper, ResNeXt, Wide ResNet)."""

from __future__ import annotations

from torch import Tensor, nn

from fusedres.blocks.block import Block, NormLayer, conv1x1, conv3x3, one_of
from fusedres.residual import Residual, Stage


class Bottleneck(Block):
    """y = relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut(x))

    torchvision's block (the stride stands on the 3x3), and equally `(in_planes, planes, stride)` as tutorials write
    it: where the shapes ask for a projection and no `downsample` is given, the block builds its own.

    Args:
        inplanes: channels of x; also `in_planes`, `in_channels`.
        planes: y has `expansion` times as many channels; also `out_channels`.
        stride: of the 3x3 convolution and the projection.
        downsample: the projection, if it is to be another than conv1x1 + norm.
        groups: of the 3x3 convolution (ResNeXt).
        base_width: the inner width is planes * base_width / 64 * groups (Wide ResNet, ResNeXt).
        dilation: of the 3x3 convolution.
        norm_layer: a function of the channel count; nn.BatchNorm2d if None.
        zero_init_residual: start the last norm's weight at zero, so that the block begins as its shortcut.

    >>> import torch
    >>> Bottleneck(256, 64, groups=32, base_width=4)(torch.randn(2, 256, 8, 8)).shape
    torch.Size([2, 256, 8, 8])
    """

    expansion: int = 4
    residual = Residual(
        (Stage("conv1", "bn1", "relu"), Stage("conv2", "bn2", "relu"), Stage("conv3", "bn3")),
        "downsample",
        act="relu",
    )

    def __init__(
        self,
        inplanes: int | None = None,
        planes: int | None = None,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer | None = None,
        *,
        in_planes: int | None = None,
        in_channels: int | None = None,
        out_channels: int | None = None,
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__()
        inplanes = one_of(inplanes=inplanes, in_planes=in_planes, in_channels=in_channels)
        planes = one_of(planes=planes, out_channels=out_channels)
        norm_layer = norm_layer or nn.BatchNorm2d
        width, outplanes = int(planes * (base_width / 64.0)) * groups, planes * self.expansion
        self.conv1 = conv1x1(inplanes, width)
        self.bn1 = norm_layer(width)
        self.conv2 = conv3x3(width, width, stride, groups, dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = conv1x1(width, outplanes)
        self.bn3 = norm_layer(outplanes)
        self.relu = nn.ReLU(inplace=True)
        self.stride = stride
        self._set_shortcut(downsample, inplanes, outplanes, stride, norm_layer)
        if zero_init_residual:
            self.zero_init_last()

    def eager_forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.shortcut is not None:
            x = self.shortcut(x)
        elif self.downsample is not None:
            x = self.downsample(x)
        out += x
        return self.relu(out)

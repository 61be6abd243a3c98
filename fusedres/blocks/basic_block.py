"""BasicBlock: two 3x3 convolutions and a shortcut (ResNet-18 and -34)."""

from __future__ import annotations

from torch import Tensor, nn

from fusedres.blocks.block import Block, NormLayer, conv3x3, one_of
from fusedres.residual import Residual, Stage


class BasicBlock(Block):
    """y = relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))

    torchvision's block, and equally `(in_planes, planes, stride)` as tutorials write it: where the shapes ask for a
    projection and no `downsample` is given, the block builds its own.

    Args:
        inplanes: channels of x; also `in_planes`, `in_channels`.
        planes: channels of y; also `out_channels`.
        stride: of the first convolution and the projection.
        downsample: the projection, if it is to be another than conv1x1 + norm.
        groups: of the second convolution.
        base_width: the width between the convolutions is planes * base_width / 64 * groups.
        dilation: of both convolutions.
        norm_layer: a function of the channel count; nn.BatchNorm2d if None.
        zero_init_residual: start the last norm's weight at zero, so that the block begins as its shortcut.

    >>> import torch
    >>> BasicBlock(64, 128, stride=2)(torch.randn(2, 64, 8, 8)).shape
    torch.Size([2, 128, 4, 4])
    """

    expansion: int = 1
    residual = Residual((Stage("conv1", "bn1", "relu"), Stage("conv2", "bn2")), "downsample", act="relu")

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
        width = int(planes * (base_width / 64.0)) * groups
        self.conv1 = conv3x3(inplanes, width, stride, dilation=dilation)
        self.bn1 = norm_layer(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(width, planes, groups=groups, dilation=dilation)
        self.bn2 = norm_layer(planes)
        self.stride = stride
        self._set_shortcut(downsample, inplanes, planes, stride, norm_layer)
        if zero_init_residual:
            self.zero_init_last()

    def eager_forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.shortcut is not None:
            x = self.shortcut(x)
        elif self.downsample is not None:
            x = self.downsample(x)
        out += x
        return self.relu(out)

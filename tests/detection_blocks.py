"""The blocks of detectron2 and of mmdetection, whose packages are not installed, as their public files have them."""

import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import checkpoint
from torchvision_models import FrozenBatchNorm2d


class Conv2d(nn.Conv2d):
    """detectron2.layers.Conv2d: a convolution that holds its norm and its activation."""

    def __init__(self, *args, norm=None, activation=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.norm = norm
        self.activation = activation

    def forward(self, x):
        if not torch.jit.is_scripting() and not torch.compiler.is_compiling():
            with warnings.catch_warnings(record=True):
                if x.numel() == 0 and self.training:
                    assert not isinstance(self.norm, nn.SyncBatchNorm), "SyncBatchNorm does not support empty inputs!"
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x


class Detectron2Basic(nn.Module):
    def __init__(self, in_channels=8, out_channels=8, *, stride=1, norm=nn.BatchNorm2d):
        super().__init__()
        self.in_channels, self.out_channels, self.stride = in_channels, out_channels, stride
        self.shortcut = None
        if in_channels != out_channels:
            self.shortcut = Conv2d(in_channels, out_channels, 1, stride, bias=False, norm=norm(out_channels))
        self.conv1 = Conv2d(in_channels, out_channels, 3, stride, 1, bias=False, norm=norm(out_channels))
        self.conv2 = Conv2d(out_channels, out_channels, 3, 1, 1, bias=False, norm=norm(out_channels))

    def forward(self, x):
        out = self.conv1(x)
        out = F.relu_(out)
        out = self.conv2(out)
        if self.shortcut is not None:
            shortcut = self.shortcut(x)
        else:
            shortcut = x
        out += shortcut
        out = F.relu_(out)
        return out


class Detectron2Bottleneck(nn.Module):
    def __init__(self, in_channels=8, out_channels=8, *, stride=1, norm=nn.BatchNorm2d, dilation=1, num_groups=1):
        super().__init__()
        self.in_channels, self.out_channels, self.stride = in_channels, out_channels, stride
        inside = out_channels // 2
        self.shortcut = None
        if in_channels != out_channels:
            self.shortcut = Conv2d(in_channels, out_channels, 1, stride, bias=False, norm=norm(out_channels))
        self.conv1 = Conv2d(in_channels, inside, 1, bias=False, norm=norm(inside))
        geometry = {"stride": stride, "padding": dilation, "dilation": dilation, "groups": num_groups}
        self.conv2 = Conv2d(inside, inside, 3, bias=False, norm=norm(inside), **geometry)
        self.conv3 = Conv2d(inside, out_channels, 1, bias=False, norm=norm(out_channels))

    def forward(self, x):
        out = self.conv1(x)
        out = F.relu_(out)
        out = self.conv2(out)
        out = F.relu_(out)
        out = self.conv3(out)
        if self.shortcut is not None:
            shortcut = self.shortcut(x)
        else:
            shortcut = x
        out += shortcut
        out = F.relu_(out)
        return out


class Activated(nn.Module):
    """A residual block of convolutions that hold their activations too, one a module and one a function."""

    def __init__(self, channels=8):
        super().__init__()
        self.conv1 = Conv2d(channels, 4, 1, norm=nn.BatchNorm2d(4), activation=nn.SiLU())
        self.conv2 = Conv2d(4, 4, 3, 1, 1, norm=nn.BatchNorm2d(4), activation=F.relu)
        self.conv3 = Conv2d(4, channels, 1, norm=nn.BatchNorm2d(channels))

    def forward(self, x):
        return F.relu(x + self.conv3(self.conv2(self.conv1(x))))


class MmdetBase(nn.Module):
    """What both of mmdet.models.backbones.resnet's blocks share."""

    def _add_norm(self, number, channels):
        name = f"bn{number}"
        setattr(self, f"norm{number}_name", name)
        self.add_module(name, nn.BatchNorm2d(channels))

    @property
    def norm1(self):
        return getattr(self, self.norm1_name)

    @property
    def norm2(self):
        return getattr(self, self.norm2_name)

    @property
    def norm3(self):
        return getattr(self, self.norm3_name)

    def _finish(self, inplanes, outplanes, stride, dilation, with_cp):
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inplanes != outplanes:
            self.downsample = nn.Sequential(
                nn.Conv2d(inplanes, outplanes, 1, stride, bias=False), nn.BatchNorm2d(outplanes)
            )
        self.stride, self.dilation, self.with_cp = stride, dilation, with_cp


class MmdetBasic(MmdetBase):
    def __init__(self, inplanes=8, planes=8, stride=1, dilation=1, with_cp=False):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, dilation, dilation, bias=False)
        self._add_norm(1, planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self._add_norm(2, planes)
        self._finish(inplanes, planes, stride, dilation, with_cp)

    def forward(self, x):
        def _inner_forward(x):
            identity = x
            out = self.conv1(x)
            out = self.norm1(out)
            out = self.relu(out)
            out = self.conv2(out)
            out = self.norm2(out)
            if self.downsample is not None:
                identity = self.downsample(x)
            out += identity
            return out

        if self.with_cp and x.requires_grad:
            out = checkpoint.checkpoint(_inner_forward, x, use_reentrant=False)
        else:
            out = _inner_forward(x)
        out = self.relu(out)
        return out


class MmdetBottleneck(MmdetBase):
    def __init__(self, inplanes=8, planes=2, stride=1, dilation=1, with_cp=False, plugins=None):
        super().__init__()
        self.plugins = plugins
        self.with_plugins = plugins is not None
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self._add_norm(1, planes)
        self.with_dcn = False
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, dilation, dilation, bias=False)
        self._add_norm(2, planes)
        self.conv3 = nn.Conv2d(planes, planes * 4, 1, bias=False)
        self._add_norm(3, planes * 4)
        self._finish(inplanes, planes * 4, stride, dilation, with_cp)

    def forward(self, x):
        def _inner_forward(x):
            identity = x
            out = self.conv1(x)
            out = self.norm1(out)
            out = self.relu(out)
            if self.with_plugins:
                out = self.forward_plugin(out, self.after_conv1_plugin_names)
            out = self.conv2(out)
            out = self.norm2(out)
            out = self.relu(out)
            if self.with_plugins:
                out = self.forward_plugin(out, self.after_conv2_plugin_names)
            out = self.conv3(out)
            out = self.norm3(out)
            if self.with_plugins:
                out = self.forward_plugin(out, self.after_conv3_plugin_names)
            if self.downsample is not None:
                identity = self.downsample(x)
            out += identity
            return out

        if self.with_cp and x.requires_grad:
            out = checkpoint.checkpoint(_inner_forward, x, use_reentrant=False)
        else:
            out = _inner_forward(x)
        out = self.relu(out)
        return out


def frozen(channels):
    return FrozenBatchNorm2d(channels)


DETECTRON2 = {
    "detectron2 basic": Detectron2Basic,
    "detectron2 basic projection": lambda: Detectron2Basic(8, 6, stride=2),
    "detectron2 bottleneck": Detectron2Bottleneck,
    "detectron2 bottleneck projection": lambda: Detectron2Bottleneck(8, 12, stride=2, num_groups=2),
    "detectron2 dilated": lambda: Detectron2Bottleneck(dilation=2),
    "detectron2 frozen": lambda: Detectron2Bottleneck(8, 12, norm=frozen),
    "detectron2 activations": Activated,
}
MMDET = {
    "mmdet basic": MmdetBasic,
    "mmdet basic projection": lambda: MmdetBasic(8, 6, 2),
    "mmdet bottleneck": MmdetBottleneck,
    "mmdet bottleneck projection": lambda: MmdetBottleneck(8, 3, 2, dilation=2),
}

"""The layers of transformers' ResNet, as its modeling_resnet.py has them, under their own names."""

from torch import nn

MODULE = "transformers.models.resnet.modeling_resnet"


class ResNetConvLayer(nn.Module):
    __module__ = MODULE

    def __init__(self, in_channels, out_channels, kernel_size=3, stride=1, activation=True):
        super().__init__()
        padding = kernel_size // 2
        self.convolution = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.normalization = nn.BatchNorm2d(out_channels)
        self.activation = nn.ReLU() if activation else nn.Identity()

    def forward(self, hidden_states):
        hidden_states = self.convolution(hidden_states)
        hidden_states = self.normalization(hidden_states)
        hidden_states = self.activation(hidden_states)
        return hidden_states


class ResNetShortCut(nn.Module):
    __module__ = MODULE

    def __init__(self, in_channels, out_channels, stride=2):
        super().__init__()
        self.convolution = nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)
        self.normalization = nn.BatchNorm2d(out_channels)

    def forward(self, input):
        hidden_state = self.convolution(input)
        hidden_state = self.normalization(hidden_state)
        return hidden_state


class Layer(nn.Module):
    def __init__(self, in_channels, out_channels, stride=1):
        super().__init__()
        projects = in_channels != out_channels or stride != 1
        self.shortcut = ResNetShortCut(in_channels, out_channels, stride) if projects else nn.Identity()
        self.layer = nn.Sequential(*self.convolutions(in_channels, out_channels, stride))
        self.activation = nn.ReLU()

    def forward(self, hidden_state):
        residual = hidden_state
        hidden_state = self.layer(hidden_state)
        residual = self.shortcut(residual)
        hidden_state += residual
        hidden_state = self.activation(hidden_state)
        return hidden_state


class ResNetBasicLayer(Layer):
    __module__ = MODULE
    forward = Layer.forward

    def convolutions(self, inside, outside, stride):
        yield ResNetConvLayer(inside, outside, stride=stride)
        yield ResNetConvLayer(outside, outside, activation=False)


class ResNetBottleNeckLayer(Layer):
    __module__ = MODULE
    forward = Layer.forward

    def convolutions(self, inside, outside, stride):
        yield ResNetConvLayer(inside, outside // 2, kernel_size=1)
        yield ResNetConvLayer(outside // 2, outside // 2, stride=stride)
        yield ResNetConvLayer(outside // 2, outside, kernel_size=1, activation=False)

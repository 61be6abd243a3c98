"""Blocks that are one autograd function, and what they are called with."""

from functools import partial

import torch
from eager import pair, sample

BUILDS = {
    "basic, identity": partial(pair, "BasicBlock", 4, 4),
    "basic, projection": partial(pair, "BasicBlock", 4, 6, 2),
    "bottleneck, identity": partial(pair, "Bottleneck", 8, 2),
    "bottleneck, projection": partial(pair, "Bottleneck", 4, 2, 2),
    "bottleneck, groups": partial(pair, "Bottleneck", 8, 2, groups=2),
}
POLICIES = ("fast", "lean", "min")
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def input_of(block, dtype=torch.float64, layout="channels_last"):
    return sample(3, block.conv1.in_channels, 6, 6, dtype=dtype).to(memory_format=LAYOUTS[layout])


def is_segment(y):
    return type(y.grad_fn).__name__ == "SegmentFunctionBackward"

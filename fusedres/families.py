"""The families of blocks that fuse knows: a class by where it is defined, and the function that describes its blocks.

Nothing here imports a framework. What no row names is described by `proof.prove`, from its forward alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from torch import nn

from fusedres import chains
from fusedres.apart import is_norm, is_norm_act
from fusedres.proof import prove
from fusedres.report import Code, Objection
from fusedres.residual import Host, Residual, Stage
from fusedres.swap import Description, class_of

Describe = Callable[[nn.Module], Residual | Objection]


@dataclass(frozen=True)
class Finding:
    """What a module was recognised as, and its description or what stands against it."""

    family: str
    description: Description | Objection


@dataclass(frozen=True)
class Family:
    name: str
    describe: Describe


def _always(residual: Residual) -> Describe:
    return lambda block: residual


def _unsupported(reason: str, code: Code = Code.UNSUPPORTED) -> Describe:
    return lambda block: Objection(code, reason)


_TORCHVISION_BASIC = Residual((Stage("conv1", "bn1", "relu"), Stage("conv2", "bn2")), "downsample", act="relu")
_TORCHVISION_BOTTLENECK = Residual(
    (Stage("conv1", "bn1", "relu"), Stage("conv2", "bn2", "relu"), Stage("conv3", "bn3")), "downsample", act="relu"
)
_TIMM_BASIC = Residual(
    (Stage("conv1", "bn1", "act1", before_act=("drop_block",), after_act=("aa",)), Stage("conv2", "bn2")),
    "downsample",
    between=("se", "drop_path"),
    act="act2",
)
_TIMM_BOTTLENECK = Residual(
    (
        Stage("conv1", "bn1", "act1"),
        Stage("conv2", "bn2", "act2", before_act=("drop_block",), after_act=("aa",)),
        Stage("conv3", "bn3"),
    ),
    "downsample",
    between=("se", "drop_path"),
    act="act3",
)
_QUANTIZABLE = _unsupported("it is built to be quantized, with its additions as modules", Code.QUANTIZED)


def _timm_block(residual: Residual, block: nn.Module) -> Residual:
    """`residual`, with the activations that norms hold (norm_layer=BatchNormAct2d) beside the block's own."""
    stages, between, hosts = [], residual.between, []
    for stage in residual.stages:
        norm = block.get_submodule(stage.norm)
        if is_norm_act(norm):
            hosts.append(_host(block, stage.norm))
            held = drop, act = f"{stage.norm}.drop", f"{stage.norm}.act"
            if stage.act is None:
                between = (*held, *between)
            elif isinstance(block.get_submodule(act), nn.Identity):
                stage = replace(stage, before_act=(*held, *stage.before_act))
            else:
                after_act = (*stage.before_act, str(stage.act), *stage.after_act)
                stage = Stage(stage.conv, stage.norm, act, (drop,), after_act)
        stages.append(stage)
    return replace(residual, stages=tuple(stages), between=between, hosts=tuple(hosts)) if hosts else residual


def _hugging_face_layer(block: nn.Module) -> Residual:
    """layer: a Sequential of conv layers, the last without activation; shortcut: one more, or Identity."""
    layer = block.get_submodule("layer")
    paths = [f"layer.{name}" for name in layer._modules]
    stages = [Stage(f"{path}.convolution", f"{path}.normalization", f"{path}.activation") for path in paths]
    stages[-1] = Stage(f"{paths[-1]}.convolution", f"{paths[-1]}.normalization")
    between = (f"{paths[-1]}.activation",)
    shortcut = "shortcut"
    hosts = ["layer", *paths]
    if not isinstance(block.get_submodule("shortcut"), nn.Identity):
        shortcut = ("shortcut.convolution", "shortcut.normalization")
        hosts.append("shortcut")
    return Residual(
        tuple(stages), shortcut, between, act="activation", hosts=tuple(_host(block, path) for path in hosts)
    )


def _host(block: nn.Module, path: str) -> Host:
    module = block.get_submodule(path)
    return Host(path, type(module), len(module._modules))


_PRE_ACTIVATION = "it normalises before its convolutions, which the formula doesn't cover yet"
_SENET = "it belongs to timm's legacy senet.py; the same networks in timm's resnet.py are fused"
_TIMM_LATER = {
    "regnet.PreBottleneck": _PRE_ACTIVATION,
    "res2net.Bottle2neck": "its middle convolutions are chained over splits of the channels",
    "resnest.ResNestBottleneck": "its middle convolution is a split attention",
    "resnetv2.PreActBasic": _PRE_ACTIVATION,
    "resnetv2.PreActBottleneck": _PRE_ACTIVATION,
    "senet.Bottleneck": _SENET,
    "senet.SEResNetBlock": _SENET,
}
_HUGGING_FACE = "transformers.models.resnet.modeling_resnet."

FAMILIES: dict[str, Family] = {
    "torchvision.models.resnet.BasicBlock": Family("torchvision", _always(_TORCHVISION_BASIC)),
    "torchvision.models.resnet.Bottleneck": Family("torchvision", _always(_TORCHVISION_BOTTLENECK)),
    "torchvision.models.quantization.resnet.QuantizableBasicBlock": Family("torchvision", _QUANTIZABLE),
    "torchvision.models.quantization.resnet.QuantizableBottleneck": Family("torchvision", _QUANTIZABLE),
    "timm.models.resnet.BasicBlock": Family("timm", partial(_timm_block, _TIMM_BASIC)),
    "timm.models.resnet.Bottleneck": Family("timm", partial(_timm_block, _TIMM_BOTTLENECK)),
    **{f"timm.models.{name}": Family("timm", _unsupported(reason)) for name, reason in _TIMM_LATER.items()},
    f"{_HUGGING_FACE}ResNetBasicLayer": Family("transformers", _hugging_face_layer),
    f"{_HUGGING_FACE}ResNetBottleNeckLayer": Family("transformers", _hugging_face_layer),
    f"{_HUGGING_FACE}ResNetConvLayer": Family(
        "transformers", _always(Residual((Stage("convolution", "normalization", "activation"),)))
    ),
}


def register_family(block: str | type[nn.Module], name: str | None = None) -> Callable[[Describe], Describe]:
    """Teach fuse to describe the blocks of a class of yours.

    The function describes one block: a `Residual` of its children's paths, or an `Objection`. It is trusted;
    `fusedres.verify` says whether the numbers agree.

    Args:
        block: the class, or where it is defined ("package.module.Class"); subclasses that keep its forward count too.
        name: what the report calls the family; the package's name if None.

    >>> import torch
    >>> from fusedres.residual import Residual, Stage
    >>> class Block(torch.nn.Module):
    ...     def __init__(self, channels):
    ...         super().__init__()
    ...         self.conv = torch.nn.Conv2d(channels, channels, 3, padding=1)
    ...         self.norm = torch.nn.BatchNorm2d(channels)
    ...         self.act = torch.nn.ReLU()
    ...     def forward(self, x):
    ...         return self.act(x + self.norm(self.conv(x))) if x.numel() else x
    >>> @register_family(Block, "mine")
    ... def describe(block):
    ...     return Residual((Stage("conv", "norm"),), shortcut="", act="act", adds_in_place=False)
    >>> import fusedres
    >>> print(fusedres.fuse(torch.nn.Sequential(Block(4))))
    block  family  status  what
    0      mine    fused   norm+add+relu
    1 fused
    """
    key = block if isinstance(block, str) else _qualified_name(block)

    def register(describe: Describe) -> Describe:
        FAMILIES[key] = Family(name or key.partition(".")[0], describe)
        return describe

    return register


def find(module: nn.Module) -> Finding | None:
    """The family and description of a module; None where it is nothing like a block."""
    cls = class_of(module)
    for base in cls.__mro__:
        family = FAMILIES.get(_qualified_name(base))
        if family is not None and cls.forward is base.forward:
            return Finding(family.name, family.describe(module))
    if isinstance(module, nn.Sequential):
        runs = chains.of_sequential(module) if cls.forward is nn.Sequential.forward else None
        return None if runs is None else Finding("sequential", runs)
    if cls.__module__.startswith("torch.") or is_norm(module):
        return None
    description = prove(module) if _may_be_block(module) else None
    if isinstance(description, Residual) or (description is not None and _looks_residual(module)):
        return Finding("by its forward", description)
    runs = chains.of_forward(module)
    return None if runs is None else Finding("chain", runs)


def _qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


# A module with more batch norms is a network or one of its stages; its blocks are looked at one by one.
_MOST_NORMS = 8


def _may_be_block(module: nn.Module) -> bool:
    """Whether it's as small as a block: with a few batch norms."""
    norms = 0
    for child in module.modules():
        norms += is_norm(child)
        if norms > _MOST_NORMS:
            return False
    return norms > 0


def _looks_residual(module: nn.Module) -> bool:
    """Whether the user would expect a row: convolutions and norms of its own, and no block below it."""
    children = [child for child in module._modules.values() if child is not None]
    own = any(isinstance(child, nn.Conv2d) for child in children) and any(map(_is_norm_layer, children))
    return own and not any(isinstance(child, nn.Linear) for child in children)


def _is_norm_layer(module: nn.Module) -> bool:
    return is_norm(module) or isinstance(module, nn.modules.batchnorm._NormBase)

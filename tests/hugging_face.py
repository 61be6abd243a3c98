"""transformers' ResNet. Its import takes seconds, so a test asks for it when it runs."""

from types import ModuleType

import optional

from fusedres.testing import import_torchvision

# layers by name, with the arguments of one of each kind
LAYERS = {
    "basic": ("ResNetBasicLayer", (8, 8)),
    "basic projection": ("ResNetBasicLayer", (8, 6, 2)),
    "bottleneck": ("ResNetBottleNeckLayer", (8, 8)),
    "bottleneck projection": ("ResNetBottleNeckLayer", (8, 12, 2)),
    "bottleneck silu": ("ResNetBottleNeckLayer", (8, 8, 1, "silu")),
    "conv layer": ("ResNetConvLayer", (8, 4)),
}


def modeling() -> ModuleType:
    import_torchvision()  # which transformers imports, and which may not load beside another build of torch
    return optional.package("transformers.models.resnet.modeling_resnet")


def layer(kind: str):
    name, arguments = LAYERS[kind]
    return getattr(modeling(), name)(*arguments)


def classifier(layer_type: str = "bottleneck"):
    """A ResNet of two stages with two blocks each, from a configuration."""
    models = modeling()
    config = models.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type=layer_type, num_labels=3
    )
    return models.ResNetForImageClassification(config)

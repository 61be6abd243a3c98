"""Models by name: torchvision's and timm's, one for small images, or `module:function`."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from importlib.util import find_spec
from typing import Any

from torch import nn

from fusedres.testing import import_torchvision


class UnknownModel(ValueError):  # noqa: N818  the message says the rest
    """No model of that name; the message lists the nearest ones."""


def build(name: str) -> nn.Module:
    """A new model with random weights.

    Args:
        name: of torchvision or timm, the first where both have it ("timm/resnet50" chooses), "cifar/resnet18", or
            `module:function`, a function without arguments that returns a model.
    """
    if ":" in name:
        return _from_function(name)
    library, _, short = name.rpartition("/")
    catalogues = _catalogues()
    if library and library not in catalogues:
        raise UnknownModel(f"{library} is not installed or has no catalogue of models; choose torchvision or timm")
    for owner, names in catalogues.items():
        if short in names and library in ("", owner):
            return _create(owner, short)
    every = sorted({known for names in catalogues.values() for known in names})
    near = difflib.get_close_matches(short, every, n=5, cutoff=0.5)
    if not catalogues:
        raise UnknownModel(f"{name!r} needs torchvision or timm; pip install torchvision, or give module:function")
    hint = f"did you mean {', '.join(near)}?" if near else "give a name of torchvision or timm, or module:function"
    raise UnknownModel(f"no model is called {name!r}; {hint}")


def _catalogues() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    if find_spec("torchvision") is not None:
        models = import_torchvision().models
        found["torchvision"] = set(models.list_models(module=models))
        found["cifar"] = {"resnet18"}
    if find_spec("timm") is not None:
        found["timm"] = set(_timm().list_models())
    return found


def _create(library: str, name: str) -> nn.Module:
    if library == "timm":
        return _timm().create_model(name)
    if library == "torchvision":
        return import_torchvision().models.get_model(name, weights=None)
    return _for_small_images(import_torchvision().models.get_model(name, weights=None, num_classes=10))


def _for_small_images(model: Any) -> nn.Module:
    """torchvision's ResNet as CIFAR's is: a stem of 3x3, without strides and pool."""
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    model.default_cfg = {"input_size": (3, 32, 32)}
    return model


def _timm() -> Any:
    if find_spec("torchvision") is not None:
        import_torchvision()  # timm imports it, and it may need help beside another build of torch
    return importlib.import_module("timm")


def _from_function(name: str) -> nn.Module:
    module, _, function = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        maker = getattr(importlib.import_module(module), function, None)
    except ModuleNotFoundError as error:
        raise UnknownModel(f"{name!r}: {error}; it is looked for on sys.path and in the current folder") from error
    finally:
        sys.path.remove(os.getcwd())
    if not callable(maker):
        raise UnknownModel(f"{module} has no function {function!r}")
    model = maker()
    if not isinstance(model, nn.Module):
        raise UnknownModel(f"{name} must return an nn.Module, got {type(model).__name__}")
    return model


def image_size(model: nn.Module) -> int:
    """Height and width that the model is made for, where it says so; 224 otherwise."""
    configuration = getattr(model, "default_cfg", None)
    return int(configuration["input_size"][-1]) if configuration else 224

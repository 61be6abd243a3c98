"""What every stage of gpu.py is given, and the few things that more than one of them needs."""

from __future__ import annotations

import gc
import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch

ROOT = Path(__file__).resolve().parent.parent
T = TypeVar("T")
Model = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Run:
    """One stage's circumstances. Tiny runs prove the code, not the speed."""

    device: torch.device
    tiny: bool
    deadline: float

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def left(self) -> float:
        """Seconds until this stage is stopped."""
        return self.deadline - time.monotonic()

    def pick(self, full: T, tiny: T) -> T:
        return tiny if self.tiny else full


def import_torchvision() -> ModuleType:
    """torchvision; through fusedres where it knows how to import it beside a CPU-only torch."""
    try:
        return importlib.import_module("fusedres.testing").import_torchvision()
    except (ImportError, AttributeError):
        return importlib.import_module("torchvision")


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]


def compiled(call: Callable[..., T], run: Run, mode: str = "default") -> Callable[..., T]:
    """One whole graph, anew for every shape: a graph break is an error, never a silent return to eager.

    Where a tiny run proves the code without a GPU, the graphs are made and run as they are.
    """
    how: dict[str, Any] = {"backend": "aot_eager"} if run.tiny and not run.cuda else {"mode": mode}
    return torch.compile(call, fullgraph=True, dynamic=False, **how)


def release(run: Run) -> None:
    """Give back the memory of models that nothing holds any more."""
    gc.collect()
    if run.cuda:
        torch.cuda.empty_cache()


def training_step(model: Model, optimizer: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor) -> None:
    """One step under bf16 autocast; the gradients are dropped at its end."""
    gradients(model, images, labels)
    optimizer.step()
    optimizer.zero_grad()


def gradients(model: Model, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and loss of one forward under bf16 autocast, with the gradients left in the parameters."""
    with torch.autocast(images.device.type, torch.bfloat16):
        logits = model(images)
        loss = torch.nn.functional.cross_entropy(logits, labels)
    loss.backward()
    return logits, loss


def sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    """Fused SGD as ResNets are trained with, at a small rate: random labels must not drive it to infinity."""
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4, fused=True)


def batch(run: Run, size: int, pixels: int, classes: int = 1000) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images, channels_last, and labels; the same for every contestant."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(size, 3, pixels, pixels, generator=generator).to(run.device)
    labels = torch.randint(classes, (size,), generator=generator).to(run.device)
    return images.contiguous(memory_format=torch.channels_last), labels

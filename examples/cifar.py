"""Train a ResNet-18 on CIFAR-10, or on generated images of the same shape, and compare its speed with eager.

    python examples/cifar.py                                     generated images: nothing is downloaded
    python examples/cifar.py --data cifar-10-batches-py          the folder of the dataset's Python version
    python examples/cifar.py --epochs 15 --dtype bf16 --plot training.png

The fused network is `fusedres.models.cifar_resnet18`, trained as any other module is. Progress bars need rich and the
plot matplotlib: pip install 'fusedres[cli]'.
"""

from __future__ import annotations

import argparse
import pickle
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

import fusedres
from fusedres.testing import import_torchvision

MEAN, DEVIATION = (0.491, 0.482, 0.447), (0.247, 0.244, 0.262)
CLASSES = 10
Item = TypeVar("Item")


def watched(items: Iterable[Item], what: str, count: int) -> Iterable[Item]:
    """A progress bar where somebody sees it."""
    return track(items, what, count, transient=True, disable=not sys.stdout.isatty())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with data_batch_1 ... and test_batch; generated without it")
    parser.add_argument("--images", type=int, default=2000, help="how many are generated (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16 means autocast to it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=10, help="timed pairs of steps, fused and eager")
    parser.add_argument("--plot", type=Path, help="where to draw loss and accuracy, as PNG")
    return parser.parse_args()


def load(folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, test images and labels, from the batches of CIFAR-10's Python version."""

    def batch(name: str) -> tuple[Tensor, Tensor]:
        content = pickle.loads((folder / name).read_bytes(), encoding="latin1")
        return torch.from_numpy(content["data"]).view(-1, 3, 32, 32), torch.tensor(content["labels"])

    images, labels = zip(*(batch(path.name) for path in sorted(folder.glob("data_batch_*"))), strict=True)
    return _scaled(torch.cat(images)), torch.cat(labels), _scaled(batch("test_batch")[0]), batch("test_batch")[1]


def _scaled(pixels: Tensor) -> Tensor:
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, DEVIATION))
    return (pixels.float() / 255 - mean) / deviation


def generate(count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A blurred pattern for each class, shifted at random and under noise: learnt in a few epochs, but not at once."""
    generator = torch.Generator().manual_seed(0)
    patterns = F.interpolate(torch.randn(CLASSES, 3, 8, 8, generator=generator), size=32, mode="bilinear")

    def draw(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(CLASSES, (count,), generator=generator)
        shifts = torch.randint(-4, 5, (count, 2), generator=generator).tolist()
        images = [patterns[label].roll(tuple(shift), (1, 2)) for label, shift in zip(labels, shifts, strict=True)]
        return torch.stack(images) + torch.randn(count, 3, 32, 32, generator=generator), labels

    return *draw(count), *draw(max(count // 4, 1))


def batches(images: Tensor, labels: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled, flipped and shifted by up to four pixels; an incomplete last batch is left out."""
    for index in torch.randperm(len(images)).split(size):
        if len(index) == size:
            batch = F.pad(images[index], (4, 4, 4, 4))
            top, left = torch.randint(0, 9, (2,)).tolist()
            batch = batch[:, :, top : top + 32, left : left + 32]
            yield batch.flip(3) if torch.rand(()) < 0.5 else batch, labels[index]


def eager_resnet18() -> nn.Module:
    """torchvision's ResNet-18 with the same stem, for 32 px images."""
    model = import_torchvision().models.resnet18(num_classes=CLASSES)
    model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    model.maxpool = nn.Identity()
    return model


class Trainer:
    """A model and what trains it."""

    def __init__(self, model: nn.Module, options: argparse.Namespace, steps: int) -> None:
        self.device = torch.device(options.device)
        self.model = model.to(self.device, memory_format=torch.channels_last).train()
        self.dtype = torch.bfloat16 if options.dtype == "bf16" else None
        self.optimizer = torch.optim.SGD(model.parameters(), options.lr, momentum=0.9, weight_decay=5e-4, fused=True)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, options.lr, total_steps=max(steps, 2))

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            return F.cross_entropy(self.model(images), labels)

    def step(self, images: Tensor, labels: Tensor) -> float:
        images = images.to(self.device, memory_format=torch.channels_last)
        loss = self.loss(images, labels.to(self.device))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()  # waits for a GPU

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        self.model.eval()
        right = 0
        for batch, answers in zip(images.split(256), labels.split(256), strict=True):
            batch = batch.to(self.device, memory_format=torch.channels_last)
            right += int((self.model(batch).argmax(1).cpu() == answers).sum())
        self.model.train()
        return right / len(images)


def speed(fused: Trainer, options: argparse.Namespace, images: Tensor, labels: Tensor) -> str:
    """Images a second of both networks, a pair of steps a round."""
    trainers = {"fusedres": fused, "eager": Trainer(eager_resnet18(), options, options.rounds + 2)}
    batch = images[: options.batch], labels[: options.batch]
    times: dict[str, list[float]] = {name: [] for name in trainers}
    for round_ in watched(range(options.rounds + 2), "timing", options.rounds + 2):
        for name, trainer in trainers.items():
            started = time.perf_counter()
            trainer.step(*batch)
            if round_ >= 2:
                times[name].append(time.perf_counter() - started)
    rates = {name: len(batch[0]) / statistics.median(found) for name, found in times.items()}
    ratio = statistics.median(b / a for a, b in zip(times["fusedres"], times["eager"], strict=True))
    return ", ".join(f"{name} {rate:.0f} images/s" for name, rate in rates.items()) + f": {ratio:.2f}x"


def plot(losses: list[float], accuracies: list[float], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    left.plot(range(1, len(losses) + 1), losses, color="#c4442b")
    left.set(title="loss", xlabel="step", ylim=(0, None))
    right.plot(range(1, len(accuracies) + 1), [100 * a for a in accuracies], marker="o", color="#c4442b")
    right.set(title="test accuracy, %", xlabel="epoch", ylim=(0, 100))
    right.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=120)


def main() -> int:
    options = parse_arguments()
    torch.manual_seed(0)
    images, labels, test_images, test_labels = load(options.data) if options.data else generate(options.images)
    options.batch = min(options.batch, len(images))
    steps = options.epochs * (len(images) // options.batch)
    trainer = Trainer(fusedres.models.cifar_resnet18(), options, steps)
    losses, accuracies = [], []
    for epoch in range(options.epochs):
        epoch_batches = batches(images, labels, options.batch)
        for batch in watched(epoch_batches, f"epoch {epoch + 1}", steps // options.epochs):
            losses.append(trainer.step(*batch))
            trainer.schedule.step()
        accuracies.append(trainer.accuracy(test_images, test_labels))
        print(f"epoch {epoch + 1}: loss {losses[-1]:.3f}, test accuracy {accuracies[-1]:.1%}", flush=True)
    if options.plot:
        plot(losses, accuracies, options.plot)
    if options.rounds:
        print(speed(trainer, options, images, labels))
    return 0


if __name__ == "__main__":
    sys.exit(main())

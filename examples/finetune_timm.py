"""Fine-tune a model of timm after `fusedres.fuse`: one line more than without.

    python examples/finetune_timm.py                                  random weights, generated images
    python examples/finetune_timm.py --model seresnet50 --pretrained  timm downloads the weights

The head is trained first, with the norms of the body frozen in eval mode, then everything. What is saved is an ordinary
checkpoint of the timm model: it loads with or without fusedres.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedres


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet26d", help="a name of timm (default: %(default)s)")
    parser.add_argument("--pretrained", action="store_true")
    parser.add_argument("--classes", type=int, default=4)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20, help="of each of the two phases")
    parser.add_argument("--save", type=Path, help="where to write the fine-tuned state_dict")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def draw(options: argparse.Namespace, patterns: Tensor) -> tuple[Tensor, Tensor]:
    """A batch of noisy images, a pattern of colours for each class; put your own data here."""
    labels = torch.randint(options.classes, (options.batch,))
    images = F.interpolate(patterns[labels], size=options.size) + 0.5 * torch.randn(
        options.batch, 3, options.size, options.size
    )
    return images.to(options.device, memory_format=torch.channels_last), labels.to(options.device)


def train(
    model: nn.Module, parameters: Iterable[nn.Parameter], lr: float, options: argparse.Namespace, patterns: Tensor
) -> float:
    """`--steps` steps on these parameters; returns the mean loss of the last quarter."""
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    losses = []
    for _ in range(options.steps):
        images, labels = draw(options, patterns)
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    last = losses[-max(len(losses) // 4, 1) :]
    return sum(last) / len(last)


def main() -> int:
    options = parse_arguments()
    torch.manual_seed(0)
    model = timm.create_model(options.model, pretrained=options.pretrained, num_classes=options.classes)
    model = model.to(options.device, memory_format=torch.channels_last)
    patterns = torch.randn(options.classes, 3, 4, 4)

    report = fusedres.fuse(model)  # the one line
    print(report)
    print(fusedres.verify(model, draw(options, patterns)[0][:4]))

    head = model.get_classifier()
    model.requires_grad_(False)
    head.requires_grad_(True)
    model.eval()  # frozen norms use their running statistics; the fused ops do as well
    print(f"head: loss {train(model, head.parameters(), 1e-2, options, patterns):.3f}")

    model.requires_grad_(True)
    model.train()
    print(f"all:  loss {train(model, model.parameters(), 1e-3, options, patterns):.3f}")

    if options.save:
        torch.save(model.state_dict(), options.save)
        plain = timm.create_model(options.model, num_classes=options.classes)
        plain.load_state_dict(torch.load(options.save, weights_only=True))
        print(f"saved {options.save}; it loads into timm's own {options.model}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

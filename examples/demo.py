"""Swap the blocks of a ResNet-50 for fusedres blocks and compare the two networks.

    python examples/demo.py --batch 8 --size 224 --dtype bf16

One state_dict goes into both networks. A training step of each is compared with the same step in float64, so
that eager's own rounding error stands beside fusedres's; then both are timed in turn.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedres
from fusedres.testing import import_torchvision

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16}

# A ReLU whose input rounds to the other side of 0 changes its gradient by all of it, in eager as in fusedres;
# in fp32 that is most of the error of the gradients, and a matter of luck.
FLIPPED_RELU = 0.02


@dataclass(frozen=True)
class TrainingStep:
    """Forward and backward on one batch.

    Args:
        images: (N, 3, H, W)
        labels: (N,) int64
        autocast: the dtype that autocast computes in; None for no autocast.
    """

    images: Tensor
    labels: Tensor
    autocast: torch.dtype | None

    def precision(self) -> torch.autocast:
        return torch.autocast(self.images.device.type, dtype=self.autocast, enabled=self.autocast is not None)

    def __call__(self, model: nn.Module) -> Tensor:
        """The logits; the gradients are left in the parameters."""
        model.zero_grad(set_to_none=True)
        with self.precision():
            logits = model(self.images)
            loss = F.cross_entropy(logits, self.labels)
        loss.backward()
        return logits.detach()


def parse_arguments() -> argparse.Namespace:
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description="A ResNet-50 with fusedres blocks beside eager PyTorch.")
    parser.add_argument("--batch", type=int, default=4, help="images in a step (default: %(default)s)")
    parser.add_argument("--size", type=int, default=160, help="height and width (default: %(default)s)")
    parser.add_argument("--dtype", choices=AUTOCAST, default="fp32", help="bf16 means autocast to it")
    parser.add_argument("--rounds", type=int, default=20, help="timed pairs of steps (default: %(default)s)")
    parser.add_argument("--device", default=default_device, help="default: %(default)s")
    return parser.parse_args()


def state_dict_entries(eager: nn.Module, fused: nn.Module) -> int:
    """Load each network from the other, strictly, and count the entries; all must be equal, in one order."""
    fused.load_state_dict(eager.state_dict(), strict=True)
    eager.load_state_dict(fused.state_dict(), strict=True)
    ours, theirs = fused.state_dict(), eager.state_dict()
    if list(ours) != list(theirs) or not all(torch.equal(ours[name], theirs[name]) for name in theirs):
        raise SystemExit("the two state_dicts differ after loading")
    return len(theirs)


def results(model: nn.Module, step: TrainingStep) -> dict[str, Tensor]:
    """What a step leaves behind, in float64; taken from a copy, so that the model stays as it was."""
    model = copy.deepcopy(model)
    output = step(model)
    found = {
        "output": [output],
        "gradients": [p.grad for p in model.parameters() if p.grad is not None],
        "running statistics": [b for name, b in model.named_buffers() if "running" in name],
    }
    return {name: torch.cat([t.double().flatten() for t in tensors]) for name, tensors in found.items()}


def print_errors(eager: nn.Module, fused: nn.Module, step: TrainingStep) -> bool:
    """Print the errors of one step against float64; True if fusedres is about as close to it as eager.

    This is one draw of each rounding error; the tests pool thousands.
    """
    exact_step = replace(step, images=step.images.double(), autocast=None)
    exact = results(copy.deepcopy(eager).double(), exact_step)
    theirs, ours = results(eager, step), results(fused, step)
    print(f"  {'relative error against float64':38}{'eager':>9}{'fusedres':>10}")
    all_agree = True
    for name, value in exact.items():
        eager_error, error = ((got[name] - value).norm() / value.norm() for got in (theirs, ours))
        agrees = bool(error <= 2 * eager_error + (FLIPPED_RELU if name == "gradients" else 0))
        all_agree &= agrees
        print(f"  {name:38}{eager_error:9.1e}{error:10.1e}  {'agrees' if agrees else 'DIFFERS'}")
    return all_agree


def milliseconds(model: nn.Module, step: TrainingStep) -> float:
    """The time of one step; on CUDA with the work that it launched."""
    if step.images.is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    step(model)
    if step.images.is_cuda:
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started)


def progress(total: int, what: str) -> Iterator[int]:
    """Count to total beside a bar redrawn in place; where there is no terminal, beside four lines."""
    started, width, terminal = time.monotonic(), 30, sys.stderr.isatty()
    for done in range(total + 1):
        seconds = time.monotonic() - started
        if terminal:
            bar = "━" * (width * done // total)
            left = f"{seconds / done * (total - done):.0f} s left" if done else ""
            print(f"\r\033[K  {what} {bar:·<{width}} {done}/{total} {left}", end="", file=sys.stderr, flush=True)
        elif 4 * done // total > 4 * (done - 1) // total and done:
            print(f"  {what} {done}/{total} after {seconds:.0f} s", file=sys.stderr, flush=True)
        if done < total:
            yield done
    if terminal:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def print_times(eager: nn.Module, fused: nn.Module, step: TrainingStep, rounds: int) -> None:
    """Time both in turn, a pair a round; the order alternates, so that any drift hits both alike."""
    times: dict[nn.Module, list[float]] = {eager: [], fused: []}
    warm_up = 2
    for i in progress(warm_up + rounds, "timing"):
        for model in (eager, fused) if i % 2 else (fused, eager):
            elapsed = milliseconds(model, step)
            if i >= warm_up:
                times[model].append(elapsed)
    ratios = [theirs / ours for theirs, ours in zip(times[eager], times[fused], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
    theirs, ours = statistics.median(times[eager]), statistics.median(times[fused])
    print(f"  {'time of a step, median (ms)':38}{theirs:9.1f}{ours:10.1f}  {middle:.2f}x as fast as eager")
    print(f"  {'':57}  (middle half of {rounds} pairs: {low:.2f}x to {high:.2f}x)")


def bytes_kept(model: nn.Module, step: TrainingStep) -> int:
    """The distinct storages that autograd keeps from forward for backward, parameters and input left out."""
    owned = (*model.parameters(), *model.buffers(), step.images, step.labels)
    known = {tensor.untyped_storage().data_ptr() for tensor in owned}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step(model)
    return sum(kept.values())


def peak_bytes(model: nn.Module, step: TrainingStep) -> int:
    """The most that CUDA's allocator held during a step, beyond what it held before."""
    model.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(model)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def print_memory(eager: nn.Module, fused: nn.Module, step: TrainingStep) -> None:
    measures = {"kept from forward for backward (MiB)": bytes_kept}
    if step.images.is_cuda:
        measures["peak of CUDA's allocator (MiB)"] = peak_bytes
    for name, measure in measures.items():
        theirs, ours = measure(eager, step), measure(fused, step)
        ratio = f"{ours / theirs:.2f}x eager's memory"
        print(f"  {name:38}{theirs / 2**20:9.1f}{ours / 2**20:10.1f}  {ratio}")


def print_backends(fused: nn.Module, step: TrainingStep) -> None:
    """Count what fusedres.explain lists op by op."""
    with step.precision():
        choices = fusedres.explain(fused, step.images).choices
    counts = Counter((choice.op, choice.backend) for choice in choices)
    for (op, backend), count in counts.items():
        print(f"  {count} x {op} in a forward ran on the {backend} backend")
    if {choice.backend for choice in choices} == {"reference"}:
        print("  (reference: plain PyTorch operations; expect about 1.0x in time and in memory)")


def main() -> int:
    options = parse_arguments()
    device = torch.device(options.device)
    resnet = import_torchvision().models.resnet

    torch.manual_seed(0)
    eager = resnet.ResNet(resnet.Bottleneck, [3, 4, 6, 3])
    for block in eager.modules():
        if isinstance(block, resnet.Bottleneck):  # as if trained: at 1, rounding errors grow from block to block
            nn.init.constant_(block.bn3.weight, 0.2)
    fused = resnet.ResNet(fusedres.Bottleneck, [3, 4, 6, 3])
    images = torch.randn(options.batch, 3, options.size, options.size)
    labels = torch.randint(1000, (options.batch,))
    eager, fused, images = (t.to(device, memory_format=torch.channels_last) for t in (eager, fused, images))
    step = TrainingStep(images, labels.to(device), AUTOCAST[options.dtype])

    cuda = device.type == "cuda"
    where = torch.cuda.get_device_name(device) if cuda else f"CPU (threads: {torch.get_num_threads()})"
    shape = f"batch {options.batch}, {options.size} x {options.size}, {options.dtype}, channels_last"
    print(f"fusedres {fusedres.__version__}, torch {torch.__version__}, {where}")
    print(f"ResNet-50, one training step (forward and backward), {shape}\n")

    print(f"  state_dict: {state_dict_entries(eager, fused)} entries, loaded strictly both ways\n")
    all_agree = print_errors(eager, fused, step)
    print()
    print_times(eager, fused, step, options.rounds)
    print_memory(eager, fused, step)
    print()
    print_backends(fused, step)
    return 0 if all_agree else 1


if __name__ == "__main__":
    sys.exit(main())

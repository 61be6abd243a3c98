"""Train a fused network on several processes with DistributedDataParallel.

    torchrun --nproc-per-node 2 examples/ddp.py

NCCL where each process has a GPU of its own, gloo on CPUs otherwise. Fuse before wrapping; nothing else differs from
DDP as usual. `--sync-bn` converts the norms to SyncBatchNorm, whose statistics are of all processes' images; those are
fused too, on CPUs as well. There DDP refuses to wrap them: convert what is wrapped.
"""

from __future__ import annotations

import argparse
import os
import sys

import torch
import torch.distributed as dist
import torch.distributed.nn  # before the group: when DDP imports it, its default arguments keep the group for ever
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fusedres
from fusedres.testing import import_torchvision


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", help="a name of torchvision (default: %(default)s)")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--batch", type=int, default=16, help="images of each process in a step")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--sync-bn", action="store_true", help="statistics over all processes")
    return parser.parse_args()


def apart(model: nn.Module) -> float:
    """The largest difference of any parameter from its mean over all processes."""
    largest = torch.zeros(())
    for parameter in model.parameters():
        mean = parameter.detach().clone()
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
        largest = torch.maximum(largest, (mean - parameter.detach()).abs().max().cpu())
    return largest.item()


def train(options: argparse.Namespace, device: torch.device) -> float:
    """How far the processes' parameters are apart after some steps."""
    rank = dist.get_rank()
    torch.manual_seed(rank)  # DDP hands the first process's weights to all
    model = getattr(import_torchvision().models, options.model)(num_classes=10)
    report = fusedres.fuse(model)
    model = model.to(device, memory_format=torch.channels_last)
    parallel = DistributedDataParallel(model, device_ids=None if device.index is None else [device.index])
    if options.sync_bn:
        nn.SyncBatchNorm.convert_sync_batchnorm(parallel)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for step in range(options.steps):
        images = torch.randn(options.batch, 3, options.size, options.size, device=device)
        labels = torch.randint(10, (options.batch,), device=device)
        loss = F.cross_entropy(parallel(images.contiguous(memory_format=torch.channels_last)), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)
    difference = apart(model)
    if rank == 0:
        processes = f"{len(report.fused)} fused on each of {dist.get_world_size()} processes"
        print(f"{processes}; parameters differ by {difference}")
    return difference


def main() -> int:
    options = parse_arguments()
    gpu = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    dist.init_process_group("nccl" if gpu else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    try:
        difference = train(options, device)
    finally:
        dist.destroy_process_group()  # when nothing refers to it any more: its threads end here, not after Python
    return int(difference != 0)


if __name__ == "__main__":
    sys.exit(main())

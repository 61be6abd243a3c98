"""Serve a model of torchvision with `fusedres.optimize`: one thread a request, batches of any size, new weights live.

    python examples/serve.py                                       random weights, generated images
    python examples/serve.py --model resnet50 --dtype bf16 --threads 4
    python examples/serve.py --weights checkpoint.pt               a state_dict, loaded while the server runs

The optimized model is the same object: a state_dict loaded into it is noticed at the next request.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

import fusedres
from fusedres.testing import import_torchvision


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", help="a name of torchvision (default: %(default)s)")
    parser.add_argument("--weights", type=Path, help="a state_dict to load between two rounds of requests")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16 means autocast to it")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=2, help="requests served at a time")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


class Server:
    """A model behind a function that any thread may call."""

    def __init__(self, model: nn.Module, options: argparse.Namespace) -> None:
        self.model, self.device = model, torch.device(options.device)
        self.dtype = torch.bfloat16 if options.dtype == "bf16" else None

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        images = images.to(self.device, memory_format=torch.channels_last)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            return self.model(images).float().cpu()

    def timed(self, images: Tensor) -> float:
        started = time.perf_counter()
        self(images)
        return 1e3 * (time.perf_counter() - started)


def latencies(server: Server, requests: list[Tensor], threads: int) -> str:
    """All requests, `threads` at a time."""
    with ThreadPoolExecutor(threads) as pool:
        times = list(pool.map(server.timed, requests))
    return f"median {statistics.median(times):.1f} ms, slowest {max(times):.1f} ms"


def main() -> None:
    options = parse_arguments()
    torch.manual_seed(0)
    model = import_torchvision().models.get_model(options.model, weights=None).eval().to(options.device)
    eager = copy.deepcopy(model)
    requests = [torch.randn(1 + index % 4, 3, options.size, options.size) for index in range(options.requests)]

    report = fusedres.optimize(model, example=requests[0].to(options.device))
    print(str(report).splitlines()[-1])
    plain, optimized = Server(eager, options), Server(model, options)
    for name, server in (("eager", plain), ("optimized", optimized)):
        server(requests[0])
        print(f"{name}: {latencies(server, requests, options.threads)} for batches of 1 to 4")

    if options.weights:
        state = torch.load(options.weights, weights_only=True)
    else:
        state = import_torchvision().models.get_model(options.model, weights=None).state_dict()
    for module in (eager, model):
        module.load_state_dict(state)
    apart = (plain(requests[1]) - optimized(requests[1])).norm() / plain(requests[1]).norm()
    print(f"after loading other weights: {apart:.1e} apart from eager")


if __name__ == "__main__":
    main()

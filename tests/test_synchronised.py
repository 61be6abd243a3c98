"""SyncBatchNorm in fused blocks over gloo: processes with any shares of a batch equal one process with all of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fusedres

pytestmark = pytest.mark.skipif(os.name == "nt", reason="gloo's file rendezvous")

WORKER = """
import copy, sys
import torch
from torch import distributed, nn
import python_backend, fusedres
from eager import pair, randomise

rank, shares, folder, backend = int(sys.argv[1]), list(map(int, sys.argv[2].split(","))), sys.argv[3], sys.argv[4]
distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(shares))
torch.set_num_threads(1)
if backend == "python":
    fusedres.ops.register_backend(python_backend.BACKEND)
begin = sum(shares[:rank])
mine = slice(begin, begin + shares[rank])

class Net(nn.Sequential):
    def __init__(self, norm_layer):
        basic, bottleneck = fusedres.BasicBlock, fusedres.Bottleneck
        super().__init__(
            basic(4, 4, norm_layer=norm_layer), basic(4, 8, 2, norm_layer=norm_layer),
            bottleneck(8, 2, norm_layer=norm_layer),
        )

def step(model, x, weights, accumulate):
    x = x.clone().requires_grad_()
    first = model(x)
    y = model(x) if accumulate else first
    if accumulate:  # two forwards before a backward
        (first * weights).sum().backward(retain_graph=True)
        x.grad = None
        for p in model.parameters():
            p.grad = None
    (y * weights).sum().backward()
    return y.detach(), x.grad, {name: p.grad for name, p in model.named_parameters()}

cases = [
    (0.1, torch.channels_last, True), (0.1, torch.contiguous_format, False), (None, torch.channels_last, False),
]
for momentum, layout, accumulate in cases:
    torch.manual_seed(3)
    fusedres.dispatch.min_elements = 1 << 18 if accumulate else 0  # torch's own norm refuses CPU tensors of any size
    whole = Net(lambda c: nn.BatchNorm2d(c, momentum=momentum)).double()
    randomise(whole)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(whole))
    assert isinstance(model[0].bn1, nn.SyncBatchNorm)
    total = sum(shares)
    x = (3 + 2 * torch.randn(total, 4, 8, 8, dtype=torch.float64)).to(memory_format=layout)
    weights = torch.randn(total, 8, 4, 4, dtype=torch.float64)
    with fusedres.use_backend("reference"):
        y, dx, gradients = step(whole, x, weights, accumulate)
    ours, our_dx, our_gradients = step(model, x[mine], weights[mine], accumulate)

    def same(name, actual, expected):
        bar = 1e-11 * max(1.0, expected.abs().max().item()) if expected.numel() else 0
        torch.testing.assert_close(actual, expected, rtol=0, atol=bar, msg=lambda m: f"{name}: {m}")

    same("y", ours, y[mine])
    same("dx", our_dx, dx[mine])
    for name, gradient in gradients.items():
        distributed.all_reduce(our_gradients[name])
        same(name, our_gradients[name], gradient)
    for (name, buffer), expected in zip(model.named_buffers(), whole.buffers(), strict=True):
        same(name, buffer, expected)
distributed.destroy_process_group()
print("equal")
"""


def run_workers(code, count, *arguments):
    folders = [str(Path(fusedres.__file__).parents[1]), str(Path(__file__).parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    finished = [worker.communicate(timeout=240) for worker in workers]
    for out, error in finished:
        assert "equal" in out, error[-2000:]


@pytest.mark.parametrize(
    "shares, backend", [("3,5", "native"), ("1,2,4,1", "native"), ("3,0", "native"), ("3,5", "python")]
)
def test_every_share_gets_what_the_whole_batch_would(shares, backend, request, tmp_path):
    if backend == "native":
        request.getfixturevalue("native")
    run_workers(WORKER, len(shares.split(",")), shares, str(tmp_path), backend)

"""FSDP2 around blocks that train as one function: parameters are gathered and freed as for eager blocks."""

import os

import pytest
from test_synchronised import run_workers

pytestmark = pytest.mark.skipif(os.name == "nt", reason="gloo's meeting over a file is tried on Linux and macOS")

WORKER = """
import sys
import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
import fusedres
from eager import pair, sample

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
mesh = torch.distributed.init_device_mesh("cpu", (2,))
for arguments in (("BasicBlock", 4, 6, 2), ("Bottleneck", 8, 2)):
    for policy in ("fast", "min"):
        torch.manual_seed(0)
        found = []
        for block in pair(*arguments):
            fully_shard(block, mesh=mesh)
            torch.manual_seed(rank)
            with fusedres.set_memory(policy):
                for _ in range(2):
                    y = block(sample(2, arguments[1], 6, 6).requires_grad_())
                    y.square().sum().backward()
            name = type(y.grad_fn).__name__
            found.append({key: t.grad.full_tensor() for key, t in block.named_parameters()})
            assert (name == "SegmentFunctionBackward") == (len(found) == 1), name
        for key, expected in found[1].items():
            torch.testing.assert_close(found[0][key], expected, rtol=1e-10, atol=1e-10)
print("passed", flush=True)
distributed.destroy_process_group()
"""


def test_sharded_blocks_have_eagers_gradients(native, tmp_path):
    run_workers(2, lambda rank: ["-c", WORKER, rank, str(tmp_path)])

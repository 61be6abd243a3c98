"""Every example runs, in small, as a user would start it."""

import importlib.util
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the examples are tried on Linux and macOS")


def run(*words, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent), **environment}
    done = subprocess.run(
        [sys.executable, *map(str, words)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_cifar_on_generated_images(tmp_path):
    plot = tmp_path / "training.png"
    sizes = ("--images", 8, "--epochs", 2, "--batch", 4, "--rounds", 1)
    printed = run(EXAMPLES / "cifar.py", *sizes, "--dtype", "bf16", "--plot", plot)
    assert "epoch 2: loss" in printed and "eager" in printed and "images/s" in printed
    assert plot.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_cifar_reads_the_folder_of_the_dataset(tmp_path):
    for name in ("data_batch_1", "data_batch_2", "test_batch"):
        data = numpy.zeros((2, 3072), dtype=numpy.uint8)
        data[:, 1024] = 255  # the first pixel's green
        (tmp_path / name).write_bytes(pickle.dumps({"data": data, "labels": [3, 7]}))
    spec = importlib.util.spec_from_file_location("cifar", EXAMPLES / "cifar.py")
    cifar = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cifar)
    images, labels, test_images, test_labels = cifar.load(tmp_path)
    assert images.shape == (4, 3, 32, 32) and test_images.shape == (2, 3, 32, 32)
    assert labels.tolist() == [3, 7, 3, 7] and test_labels.tolist() == [3, 7]
    (mean, deviation) = cifar.MEAN[1], cifar.DEVIATION[1]
    assert images[0, 1, 0, :2].tolist() == pytest.approx([(1 - mean) / deviation, -mean / deviation])


# timm imports torchvision, which needs help beside another build of torch
AFTER_TORCHVISION = """
import runpy, sys
from fusedres.testing import import_torchvision
import_torchvision()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="the example takes its models from timm")
def test_finetuning_a_model_of_timm(tmp_path):
    saved = tmp_path / "tuned.pt"
    sizes = ("--model", "resnet10t", "--size", 32, "--batch", 4, "--steps", 2)
    printed = run("-c", AFTER_TORCHVISION, EXAMPLES / "finetune_timm.py", *sizes, "--save", saved)
    assert "6 fused" in printed and "DIFFERS" not in printed and "agrees" in printed
    assert "it loads into timm's own resnet10t" in printed
    assert "layer1.0.bn1.weight" in torch.load(saved, weights_only=True)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_serving(dtype):
    sizes = ("--size", 32, "--requests", 4, "--dtype", dtype)
    printed = run(EXAMPLES / "serve.py", *sizes).splitlines()
    assert printed[0].startswith("20 convolutions, 4 plain steps, ")
    assert printed[1].startswith("eager: median") and printed[2].startswith("optimized: median")
    apart = float(printed[3].removeprefix("after loading other weights: ").partition(" ")[0])
    assert apart < {"fp32": 1e-4, "bf16": 0.05}[dtype]


TRAIN = """
import glob, sys, weakref
from pathlib import Path
import ddp

def destroy():
    global group
    group = weakref.ref(ddp.dist.group.WORLD)
    destroy_group()

destroy_group, ddp.dist.destroy_process_group = ddp.dist.destroy_process_group, destroy
differs = ddp.main()
threads = [Path(name).read_text().strip() for name in glob.glob("/proc/self/task/*/comm")]
sys.stdout.write(f"left: {group()} {[name for name in threads if 'gloo' in name]}\\n")  # in one piece
sys.exit(differs)
"""


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch is built without gloo")
def test_two_processes():
    """None leaves its group behind: that one's threads may need the interpreter when it is gone, and abort."""
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "--no-python")
    sizes = ("--size", 32, "--batch", 2, "--steps", 2, "--sync-bn")
    paths = os.pathsep.join(map(str, (EXAMPLES, EXAMPLES.parent)))
    printed = run(*launch, sys.executable, "-c", TRAIN, *sizes, PYTHONPATH=paths)
    assert "9 fused on each of 2 processes; parameters differ by 0.0" in printed
    assert printed.count("left: None []") == 2, printed

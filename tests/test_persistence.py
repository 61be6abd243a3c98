"""Copies, pickles, checkpoints, threads and forks of a block."""

import copy
import io
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from eager import assert_matches_eager, assert_same, identity_pair, pair, projection_pair, sample
from torch import nn

import fusedres


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("build", [identity_pair, projection_pair])
def test_a_deep_copy_computes_the_same_and_shares_nothing(build, training, backend):
    fused, eager = build()
    twin = copy.deepcopy(fused.train(training))
    assert_matches_eager(twin, eager.train(training), sample())
    assert all(torch.equal(t, u) for t, u in zip(twin.parameters(), fused.parameters(), strict=True))
    assert twin.bn1.num_batches_tracked == training
    assert fused.bn1.num_batches_tracked == 0
    twin.relu = nn.LeakyReLU(0.5)
    assert type(fused.relu) is nn.ReLU


UNPICKLE = """
import os, pickle, sys
assert "fusedres" not in sys.modules
with open(os.environ["PICKLE"], "rb") as file:
    block, x, y = pickle.load(file)
import torch
assert type(block[0]).__module__.startswith("fusedres.")
assert torch.equal(block(x), y)
block.train()(x).sum().backward()
"""


def test_a_pickle_loads_where_nothing_has_imported_fusedres(tmp_path, run_python):
    block, x, path = nn.Sequential(projection_pair()[0], pair("Bottleneck", 6, 2)[0]), sample(), tmp_path / "block"
    path.write_bytes(pickle.dumps((block.eval(), x, block(x).detach())))
    run_python(UNPICKLE, PICKLE=str(path))


def test_a_whole_model_survives_torch_save(backend):
    model = fusedres.models.cifar_resnet18(num_classes=3).eval()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(torch.load(file, weights_only=False)(x), model(x))


@pytest.mark.parametrize("build", [identity_pair, projection_pair])
def test_a_state_dict_survives_torch_save_and_a_weights_only_load(build, backend):
    trained, _ = build()
    trained(sample())
    file = io.BytesIO()
    torch.save(trained.state_dict(), file)
    file.seek(0)
    fresh, eager = build()
    state = torch.load(file, weights_only=True)
    for block in (fresh, eager):
        assert str(block.load_state_dict(state, strict=True)) == "<All keys matched successfully>"
    assert fresh.bn1.num_batches_tracked == 1
    assert_matches_eager(fresh, eager, sample())


def test_a_state_dict_can_be_assigned_to_a_block_on_the_meta_device(backend):
    trained, eager = projection_pair()
    with torch.device("meta"):
        empty = fusedres.BasicBlock(4, 6, 2)
    empty.load_state_dict(trained.state_dict(), assign=True)
    assert_matches_eager(empty, eager, sample())


@pytest.mark.parametrize("target", ["half", "double", "bfloat16", "float"])
def test_a_conversion_converts_the_block_as_a_whole(target, backend):
    fused = getattr(projection_pair()[0], target)()
    dtype = next(fused.parameters()).dtype
    assert {t.dtype for t in fused.state_dict().values() if t.is_floating_point()} == {dtype}
    assert fused(sample(dtype=dtype)).dtype == dtype


def test_eight_threads_share_one_model_in_eval_mode(backend):
    fused, _ = projection_pair()
    fused.eval()
    samples = [sample() for _ in range(32)]
    with torch.no_grad():
        expected = [fused(x) for x in samples]

    def serve(x):
        with torch.no_grad():
            return fused(x)

    with ThreadPoolExecutor(8) as pool:
        for actual, y in zip(pool.map(serve, samples * 4), expected * 4, strict=True):
            assert_same("y", actual, y, exact=True)


def test_eight_threads_train_models_of_their_own(backend):
    block, _ = projection_pair()
    blocks = [copy.deepcopy(block) for _ in range(8)]
    x = sample()

    def train(block):
        block(x).square().sum().backward()
        return block.conv1.weight.grad

    with ThreadPoolExecutor(8) as pool:
        gradients = list(pool.map(train, blocks))
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


FORK = """
import os, torch, fusedres
torch.set_num_threads(1)
torch.manual_seed(0)
block, x = fusedres.BasicBlock(4, 6, 2), torch.randn(3, 4, 6, 6)
expected = block.eval()(x)
child = os.fork()
if child == 0:
    same = torch.equal(block(x), expected)
    block.train()(x).sum().backward()
    os._exit(0 if same else 1)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, which Windows has not")
def test_a_forked_child_computes_as_its_parent(run_python):
    run_python(FORK)

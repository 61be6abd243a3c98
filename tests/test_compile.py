"""torch.compile: one graph, eager's results, statistics moved once, and nothing frozen that may change."""

import pytest
import torch
from eager import assert_same_outcome, identity_pair, observe, pair, projection_pair, sample
from torch import nn

import fusedres

BUILDS = {
    "identity": identity_pair,
    "projection": projection_pair,
    "bottleneck": lambda **kwargs: pair("Bottleneck", 4, 2, 2, **kwargs),
}


@pytest.fixture(autouse=True)
def forgotten():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Recorder:
    """A backend of torch.compile that runs the graphs as they are and keeps their operations."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, inputs):
        self.graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph

    def compile(self, module):
        return torch.compile(module, fullgraph=True, backend=self)


def compiled(module, backend="aot_eager"):
    return torch.compile(module, fullgraph=True, backend=backend)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("build", BUILDS)
def test_a_compiled_block_equals_eager_and_moves_its_statistics_once(build, training, fused_backend):
    fused, eager = BUILDS[build]()
    run = compiled(fused.train(training))
    eager.train(training)
    for _ in range(2):
        x = sample()
        assert_same_outcome(observe(run, x, owner=fused), observe(eager, x), exact=False)
    assert fused.bn1.num_batches_tracked == (2 if training else 0)


@pytest.mark.parametrize("training", [True, False])
def test_without_gradients_a_compiled_block_equals_eager(training, fused_backend):
    fused, eager = projection_pair()
    run, x = compiled(fused.train(training)), sample()
    actual = observe(run, x, owner=fused, backward=False, context=torch.no_grad)
    assert_same_outcome(actual, observe(eager.train(training), x, backward=False, context=torch.no_grad), exact=False)


def test_channels_last_stays_so_under_compilation(fused_backend):
    fused, eager = projection_pair()
    x = sample().to(memory_format=torch.channels_last)
    assert_same_outcome(observe(compiled(fused), x, owner=fused), observe(eager, x), exact=False)


def test_inductor_equals_eager(fused_backend):
    fused, eager = projection_pair()
    x = sample()
    assert_same_outcome(observe(compiled(fused, "inductor"), x, owner=fused), observe(eager, x), exact=False)


def test_autocast_inside_a_compiled_region_gives_eagers_dtypes(device, fused_backend):
    fused, eager = projection_pair(dtype=torch.float32)

    def step(block):
        def run(x):
            with torch.autocast(device, dtype=torch.bfloat16):
                return block(x)

        return run

    x, state = sample(dtype=torch.float32), {name: t.clone() for name, t in fused.state_dict().items()}
    first, expected = observe(step(fused), x, owner=fused), observe(step(eager), x, owner=eager)
    fused.load_state_dict(state)
    actual = observe(compiled(step(fused)), x, owner=fused)
    assert {name: t.dtype for name, t in actual.tensors.items()} == {
        name: t.dtype for name, t in expected.tensors.items()
    }
    assert torch.equal(actual.tensors["y"], first.tensors["y"])


def test_a_whole_compiled_model_trains_as_eager(fused_backend):
    torch.manual_seed(0)
    model = fusedres.models.ResNet(fusedres.BasicBlock, (1, 1, 1, 1), 3, stem="cifar").double()
    x = sample(4, 3, 16, 16)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    expected = observe(model, x)
    model.load_state_dict(state)
    actual = observe(compiled(model), x, owner=model)
    torch.testing.assert_close(actual.tensors, expected.tensors, rtol=1e-8, atol=1e-10)


def test_other_batch_sizes_cost_one_more_compilation_at_most(fused_backend):
    recorder = Recorder()
    fused, eager = projection_pair()
    run = recorder.compile(fused.eval())
    for batch in (2, 3, 5, 8):
        x = sample(batch, 4, 6, 6)
        torch.testing.assert_close(run(x), eager.eval()(x), rtol=1e-12, atol=1e-12)
    assert len(recorder.graphs) <= 2


def test_training_steps_do_not_recompile(fused_backend):
    recorder = Recorder()
    fused, _ = projection_pair()
    run = recorder.compile(fused)
    for _ in range(4):
        run(sample()).sum().backward()
    assert len(recorder.graphs) == 1


def test_train_and_eval_are_compiled_apart(fused_backend):
    recorder = Recorder()
    fused, eager = projection_pair()
    run, x = recorder.compile(fused), sample()
    for training in (True, False, True):
        torch.testing.assert_close(run(x), eager(x), rtol=1e-12, atol=1e-12)
        fused.train(not training)
        eager.train(not training)
    torch.testing.assert_close(fused.state_dict(), eager.state_dict(), rtol=1e-12, atol=1e-12)


def test_a_kernel_backend_is_one_node_for_each_segment_in_training_and_for_each_op_elsewhere(kernels):
    recorder = Recorder()
    run = recorder.compile(projection_pair()[0])
    run(sample())
    assert "fusedres.segment.default" in recorder.graphs[0]
    with torch.no_grad():
        run(sample())
    assert "fusedres_python.bn_act.default" in recorder.graphs[1]


def test_a_change_of_backend_after_compilation_is_noticed(kernels):
    recorder = Recorder()
    fused, eager = projection_pair()
    run, x = recorder.compile(fused.eval()), sample()
    for name in ("reference", "python", "reference"):
        with fusedres.use_backend(name):
            torch.testing.assert_close(run(x), eager.eval()(x), rtol=1e-12, atol=1e-12)
    assert ["fusedres.segment.default" in graph for graph in recorder.graphs] == [False, True]


def test_a_replaced_child_after_compilation_is_noticed(fused_backend):
    fused, eager = projection_pair()
    run, x = compiled(fused), sample()
    run(x), eager(x)
    for block in (fused, eager):
        block.relu = nn.LeakyReLU(0.3)
    assert_same_outcome(observe(run, x, owner=fused), observe(eager, x), exact=False)


@pytest.mark.parametrize("target", ["bn1", "relu", "shortcut.1", "conv1"])
def test_a_hook_set_before_compilation_is_compiled_in(target, fused_backend):
    fused, eager = projection_pair()
    for block in (fused, eager):
        block.get_submodule(target).register_forward_hook(lambda module, args, y: y * 2)
    x = sample()
    assert_same_outcome(observe(compiled(fused), x, owner=fused), observe(eager, x), exact=False)

"""Under torch.compile a block is one node in training, and its kernels and its bits are those of the block without."""

import copy
import warnings
from functools import partial

import pytest
import torch
from eager import assert_same_outcome, observe, pair, sample
from segments import BUILDS, POLICIES, input_of
from torch import nn

import fusedres
from fusedres import dispatch, epilogue, segment, times
from fusedres.backends import Geometry, Norm
from fusedres.memory import Memory
from fusedres.ops import kernels
from fusedres.segment import operator
from fusedres.segment.plan import Plan, Step

NODE = "fusedres.segment.default"


@pytest.fixture(autouse=True)
def forgotten():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def graphs_of(module, x, backend="eager", **kwargs):
    """The module compiled, its outcome on x, and the graphs as Dynamo has them."""
    graphs, inner = [], torch._dynamo.lookup_backend(backend)

    def keep(graph, inputs):
        graphs.append(graph)
        return inner(graph, inputs)

    run = torch.compile(module, fullgraph=True, backend=keep)
    return run, observe(run, x, owner=module, **kwargs), graphs


def targets(graph):
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(
    "build, layout, training",
    [
        *((build, "channels_last", True) for build in BUILDS),
        ("bottleneck, projection", "contiguous", True),
        ("bottleneck, projection", "channels_last", False),
    ],
)
def test_a_compiled_block_is_one_node_with_the_bits_of_the_block(build, layout, training, kernel_backend):
    fused, _ = BUILDS[build]()
    x, twin = input_of(fused, layout=layout), copy.deepcopy(fused).train(training)
    _, outcome, (graph,) = graphs_of(fused.train(training), x, "aot_eager")
    assert targets(graph).count(NODE) == 1
    assert not any("conv" in name or "bn_act" in name for name in targets(graph))
    assert_same_outcome(outcome, observe(twin, x), exact=True)


OWN_CONVOLUTIONS = {
    "basic, identity": partial(pair, "BasicBlock", 32, 32, dtype=torch.float32),
    "bottleneck, projection": partial(pair, "Bottleneck", 32, 16, 2, dtype=torch.float32),
}


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("build", OWN_CONVOLUTIONS)
def test_convolutions_of_our_own_are_compiled_too(build, backend, native):
    half = partial(torch.autocast, "cpu", torch.bfloat16)
    fused, _ = OWN_CONVOLUTIONS[build]()
    fused.to(memory_format=torch.channels_last)
    x = sample(4, 32, 14, 14, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    twin = copy.deepcopy(fused)
    with torch.profiler.profile() as profile:
        _, outcome, (graph,) = graphs_of(fused, x, backend, context=half)
    assert NODE in targets(graph)
    operations = {event.key for event in profile.key_averages()}
    assert {"fusedres_native::conv", "fusedres_native::conv_dweight"} <= operations
    assert_same_outcome(outcome, observe(twin, x, context=half), exact=True)


@pytest.mark.parametrize("policy", POLICIES)
def test_under_every_memory_policy(policy, kernel_backend):
    fused, _ = BUILDS["bottleneck, projection"]()
    x, twin = input_of(fused), copy.deepcopy(fused)
    with fusedres.set_memory(policy):
        _, outcome, (graph,) = graphs_of(fused, x, "aot_eager")
        assert NODE in targets(graph)
        assert_same_outcome(outcome, observe(twin, x), exact=True)


def test_another_batch_size_costs_one_more_compilation_and_none_afterwards(kernel_backend):
    fused, eager = BUILDS["bottleneck, projection"]()
    run, _, graphs = graphs_of(fused, input_of(fused), "aot_eager")
    observe(eager, input_of(fused))
    eager.load_state_dict(fused.state_dict())
    for batch in (5, 4, 6):
        x = sample(batch, 4, 6, 6).to(memory_format=torch.channels_last)
        assert_same_outcome(observe(run, x, owner=fused), observe(eager, x), exact=False)
    assert [NODE in targets(graph) for graph in graphs] == [True, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_symbolic_batch_size_has_our_convolutions(dtype, native):
    block = fusedres.BasicBlock(32, 32).to(memory_format=torch.channels_last, dtype=dtype)
    twin = copy.deepcopy(block)
    run = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (4, 6):
        x = sample(batch, 32, 16, 16, dtype=dtype).to(memory_format=torch.channels_last)
        with torch.profiler.profile() as profile:
            outcome = observe(run, x, owner=block)
        operations = {event.key for event in profile.key_averages()}
        assert {"fusedres_native::conv", "fusedres_native::conv_dweight"} <= operations
        expected = observe(twin, x).tensors
        for name, actual in outcome.tensors.items():
            # Of another size than it was compiled with a convolution may have another of its forms.
            bound = 0 if batch == 4 else 2 * torch.finfo(dtype).eps * expected[name].abs().max()
            assert (actual - expected[name]).abs().max() <= bound, name


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_sums_that_are_not_finite_stay_where_they_belong(value, native):
    block = fusedres.BasicBlock(32, 32).to(memory_format=torch.channels_last).eval()
    x = sample(4, 32, 16, 16, dtype=torch.float32).to(memory_format=torch.channels_last)
    twin = copy.deepcopy(block)
    run, outcome, _ = graphs_of(block, x, "aot_eager")
    assert_same_outcome(outcome, observe(twin, x), exact=True)
    x[1, 2, 3, 4] = value
    found = observe(run, x, owner=block)
    expected = observe(twin, x)
    assert found.tensors["d conv1.weight"].isfinite().any() and not found.tensors["d conv1.weight"].isfinite().all()
    assert_same_outcome(found, expected, exact=True)


def test_second_derivatives_are_torchs_own_error(kernel_backend):
    x, errors = input_of(BUILDS["basic, projection"]()[0]), []
    for block in BUILDS["basic, projection"]():
        run = torch.compile(block, fullgraph=True, backend="aot_eager")
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        (dx,) = torch.autograd.grad(run(leaf).square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError) as error:
            dx.square().sum().backward()
        errors.append(str(error.value))
    assert "does not currently support double backward" in errors[0] == errors[1]


def test_gradients_nobody_asked_for_are_none(kernel_backend):
    fused, _ = BUILDS["basic, projection"]()
    for frozen in (fused.conv1.weight, fused.bn2.weight, fused.shortcut[0].weight):
        frozen.requires_grad_(False)
    x, twin = input_of(fused), copy.deepcopy(fused)
    _, outcome, _ = graphs_of(fused, x, "aot_eager")
    assert_same_outcome(outcome, observe(twin, x), exact=True)


def test_norms_without_parameters_or_statistics_and_convolutions_with_a_bias(kernel_backend):
    fused, _ = BUILDS["basic, identity"]()
    fused.conv1 = nn.Conv2d(4, 4, 3, padding=1, dtype=torch.float64)
    fused.bn1 = nn.BatchNorm2d(4, affine=False, dtype=torch.float64)
    fused.bn2 = nn.BatchNorm2d(4, track_running_stats=False, dtype=torch.float64)
    x, twin = input_of(fused), copy.deepcopy(fused)
    _, outcome, (graph,) = graphs_of(fused, x, "aot_eager")
    assert NODE in targets(graph)
    assert_same_outcome(outcome, observe(twin, x), exact=True)


def test_where_a_segment_is_not_possible_the_block_is_compiled_op_by_op(kernel_backend):
    fused, eager = BUILDS["basic, identity"]()
    for block in (fused, eager):
        block.bn1.register_forward_hook(lambda module, arguments, y: 2 * y)
    x = input_of(fused)
    _, outcome, (graph,) = graphs_of(fused, x, "aot_eager")
    assert NODE not in targets(graph)
    assert_same_outcome(outcome, observe(eager, x), exact=False)


def test_what_else_decides_is_part_of_what_compiled_graphs_are_kept_under(native, monkeypatch, tmp_path):
    fused, _ = BUILDS["basic, identity"]()
    monkeypatch.setattr(times, "are_used", lambda: True)

    def facts():
        torch._dynamo.reset()
        _, _, (graph,) = graphs_of(fused, input_of(fused))
        (node,) = (node for node in graph.graph.nodes if str(node.target) == NODE)
        return node.args[-1]

    found = [facts(), facts()]
    assert found[0] == found[1]
    assert found[0].startswith(fusedres.__version__) and " native-" in found[0]
    monkeypatch.setenv("FUSEDRES_WINOGRAD", "0")
    found.append(facts())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    found.append(facts())
    table = times.table_of("cpu")
    monkeypatch.setitem(times._read, table.path, {"an entry": {"aten": 1.0}})
    found.append(facts())
    (tmp_path / "changed.py").touch()
    monkeypatch.setattr(operator, "_PACKAGE", tmp_path)
    found.append(facts())
    assert len(set(found)) == 5


def test_a_table_of_times_that_cannot_be_used_is_no_error_of_whoever_compiles(native, monkeypatch):
    fused, _ = BUILDS["basic, identity"]()
    monkeypatch.setattr(times, "are_used", lambda: True)
    monkeypatch.setattr(times, "digest", lambda device: warnings.warn("an older library's", stacklevel=1) or "none")
    _, _, (graph,) = graphs_of(fused, input_of(fused))
    assert NODE in targets(graph)


def test_a_norm_of_a_process_group_is_not_compiled_as_one_of_this_process(kernel_backend, monkeypatch):
    fused, _ = BUILDS["bottleneck, projection"]()
    monkeypatch.setattr(segment, "group_of", lambda norm: "a group")
    _, _, (graph,) = graphs_of(fused, input_of(fused))
    assert NODE not in targets(graph)


@pytest.mark.parametrize("projects", [False, True])
def test_the_operator_passes_opcheck(projects, kernel_backend):
    def step(inputs, kernel):
        weight = torch.randn(4, inputs, kernel, kernel, dtype=torch.float64, requires_grad=True)
        affine = torch.rand(2, 4, dtype=torch.float64).unbind()
        norm = Norm(*(t.requires_grad_() for t in affine), *torch.ones(2, 4, dtype=torch.float64).unbind(), True)
        return Step(weight, None, Geometry(padding=(kernel // 2, kernel // 2)), norm, epilogue.find("relu"))

    operators = [kernels.of(dispatch.backend(kernel_backend), "bn_act")] * 2
    chain, projection = [step(4, 1), step(4, 3)], step(4, 1) if projects else None
    plan = Plan(chain, operators, True, projection, torch.float64, Memory.FAST)
    x = sample(2, 4, 5, 5).to(memory_format=torch.channels_last).requires_grad_()
    torch.library.opcheck(torch.ops.fusedres.segment.default, operator.arguments_of(plan, x, None))

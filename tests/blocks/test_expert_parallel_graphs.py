"""The graph of a step on 8 to 64 processes, captured in one with a fake process group: what each says to the others.

Nothing is run: a fake group gives no values.
"""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from functorch.compile import min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import BackendCompilerFailed
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from deepfuse.blocks.axis import Axis
from deepfuse.blocks.expert_parallel import to_expert_parallel
from deepfuse.blocks.fp8 import to_fp8
from deepfuse.blocks.model import CausalLM
from deepfuse.blocks.placement import Placement
from deepfuse.ir.device import H200
from deepfuse.passes.pipeline import default
from deepfuse.passes.runner import Runner
from deepfuse.runtime.axes import Axes, by_node
from expert_parallel_worker import TINY

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch 2.11's Dynamo


class _Captured(Exception):
    """Enough is known."""


def graphs(layer, tokens):
    """The forward and the backward graph of a mixture of experts."""
    found = []

    def keep(joint, inputs, **settings):
        found.extend(min_cut_rematerialization_partition(joint, inputs, **settings))
        raise _Captured

    backend = aot_autograd(fw_compiler=lambda gm, inputs: gm, partition_fn=keep)
    x = torch.randn(tokens, layer.gate.weight.shape[1], requires_grad=True)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_scalar_outputs=True), pytest.raises((BackendCompilerFailed, _Captured)):
        torch.compile(layer, fullgraph=True, backend=backend)(x)
    assert len(found) == 2
    return [gm.graph for gm in found]


def said(graph):
    """What a process says in a graph, in order: op, group, dtype and width, parts that are equal or decided by the data."""
    lines = []
    for node in graph.nodes:
        if getattr(node.target, "_opname", "") == "all_to_all_single":
            x, *parts, group = node.args
            value = x.meta["val"]
            sizes = [[size if isinstance(size, int) else "?" for size in part] for part in parts]
            lines.append((group, str(value.dtype), list(value.shape[1:]), *sizes))
    return lines


@pytest.fixture
def process():
    """Make this process the one of a rank, in a world that answers nothing."""
    started = []

    def start(rank, size):
        if started:
            dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
        started.append(rank)
        return Axis("expert", dist.group.WORLD.group_name, size, rank)

    yield start
    dist.destroy_process_group()


def layer_of(axis, hidden_size=32, moe_intermediate_size=24, **settings):
    widths = {"hidden_size": hidden_size, "moe_intermediate_size": moe_intermediate_size}
    config = replace(TINY, n_routed_experts=64, num_hidden_layers=1, first_k_dense_replace=0, **widths)
    with torch.device("meta"):
        model = CausalLM(config)
    to_expert_parallel(model, axis, **settings)
    model.to_empty(device="cpu")
    model.initialize()
    return model.model.layers[0].mlp


@pytest.mark.parametrize(
    ("size", "ranks", "settings"),
    [
        (8, (0, 3, 7), {}),
        (8, (0, 7), {"dispatch": "fp8"}),
        (16, (0, 7, 15), {"mode": "capacity"}),
        (64, (0, 63), {}),
    ],
)
def test_all_processes_say_the_same_in_the_same_order(process, size, ranks, settings):
    spoken = [[said(graph) for graph in graphs(layer_of(process(rank, size), **settings), 16)] for rank in ranks]
    assert all(each == spoken[0] for each in spoken)
    forward, backward = spoken[0]
    group = "0"
    if settings.get("mode") == "capacity":
        # ceil(16 tokens * 3 choices / 64 experts * 1.25) = 1 row of each for each
        part = [64 // size] * size
        assert forward == backward == [(group, "torch.float32", [32], part, part)] * 2
        return
    counts, rows = [64 // size] * size, ["?"] * size
    plain = (group, "torch.float32", [32], rows, rows)
    there = (group, "torch.uint8", [48], rows, rows) if settings else plain
    assert forward == [(group, "torch.int64", [], counts, counts), there, plain]
    # gradients as they are, of what travelled in FP8 as well
    assert backward == [plain, plain]


def test_processes_of_nodes_say_the_same_in_the_same_order(process):
    spoken = []
    for rank in (0, 5, 15):
        axis = process(rank, 16)
        axes = by_node(init_device_mesh("cpu", (16,), mesh_dim_names=("expert",)), Axes(expert=axis, rank=rank), 4)
        across, within = axes.nodes
        names = {across.group: "across", within.group: "within"}
        layer = layer_of(axis, mode="node_limited", nodes=axes.nodes)
        spoken.append([[(names[group], *rest) for group, *rest in said(graph)] for graph in graphs(layer, 16)])
    assert all(each == spoken[0] for each in spoken)
    forward, backward = spoken[0]
    to_nodes, weights = (("across", "torch.float32", [n], ["?"] * 4, ["?"] * 4) for n in (32, 3))
    inside = ("within", *to_nodes[1:])
    counts = [(name, "torch.int64", [], [n] * 4, [n] * 4) for name, n in (("across", 1), ("within", 4))]
    chosen = ("across", "torch.int64", [3], ["?"] * 4, ["?"] * 4)
    assert forward == [counts[0], to_nodes, chosen, weights, counts[1], inside, inside, to_nodes]
    # the gradients of what travelled, but for choices
    assert sorted(backward) == sorted([to_nodes, inside, inside, weights, to_nodes])


@pytest.mark.parametrize("mode", ["dropless", "capacity"])
def test_processes_that_share_slots_have_the_same_graph(process, mode):
    captured = []

    def keep(gm, inputs):
        captured.append(gm)
        raise _Captured

    for rank in (0, 15):
        layer = layer_of(process(rank, 16), mode=mode, placement=placement(16)).eval()
        torch._dynamo.reset()
        stopped = pytest.raises((BackendCompilerFailed, _Captured))
        with torch._dynamo.config.patch(capture_scalar_outputs=True), torch.no_grad(), stopped:
            torch.compile(layer, fullgraph=True, backend=aot_autograd(fw_compiler=keep))(torch.randn(16, 32))
    first, last = (gm.graph for gm in captured)
    assert str(first) == str(last) and said(first) == said(last)
    # of 128 slots eight are on each process; one row for each where a capacity is, ceil(16 * 3 / 128 * 1.25)
    sizes = [8] * 16 if mode == "capacity" else ["?"] * 16
    rows = ("0", "torch.float32", [32], sizes, sizes)
    counts = ("0", "torch.int64", [], [8] * 16, [8] * 16)
    assert said(first) == ([rows] * 2 if mode == "capacity" else [counts, rows, rows])


def placement(ranks):
    """Of 64 experts in 128 slots, one of them in 65."""
    rows = torch.tensor([[*range(64), *[5] * 64]])
    return Placement(rows, ranks, torch.ones(1, 64, dtype=torch.float64))


def test_the_counts_wait_for_the_routing_only(process):
    forward, _ = graphs(layer_of(process(0, 8)), 16)
    first = next(node for node in forward.nodes if getattr(node.target, "_opname", "") == "all_to_all_single")
    before, seen = [first], set()
    while before:
        node = before.pop()
        seen.add(getattr(node.target, "_opname", ""))
        before += node.all_input_nodes
    assert "route" in seen and "expert_permute" not in seen


@pytest.mark.parametrize("mode", ["dropless", "capacity", "dropless placed", "capacity placed"])
def test_passes_find_what_they_look_for_between_the_messages(process, mode):
    mode, _, placed = mode.partition(" ")
    how = {"mode": mode, "placement": placement(8) if placed else None}
    layer = layer_of(process(0, 8), hidden_size=256, moe_intermediate_size=128, **how).eval()
    holder = torch.nn.ModuleDict({"mlp": layer})
    to_fp8(holder, wanted=lambda name: True)
    for name, parameter in layer.named_parameters():
        if parameter.dtype == torch.float32 and "scale" not in name:
            parameter.data = parameter.data.bfloat16()
    settings = {"providers": {}, "device": H200, "max_seq_len": 64, "layout": "by rank"}
    runner = Runner(default().without("lower"), settings, strict=True)

    def backend(gm, inputs):
        runner.backend()(gm, inputs)
        raise _Captured

    torch._dynamo.reset()
    x = torch.randn(16, 256, dtype=torch.bfloat16)
    stopped = pytest.raises((BackendCompilerFailed, _Captured))
    with torch._dynamo.config.patch(capture_scalar_outputs=True), torch.no_grad(), stopped:
        torch.compile(layer, fullgraph=True, backend=backend)(x)
    (graph,) = runner.journal.graphs
    rewrites = {p.name: p.rewrites for p in graph.passes if p.stage == "quantize" and p.rewrites}
    # one quantize of a token serves the message, gate and up of the shared expert; the message's, both of the experts'
    fused = {"fuse_swiglu_quantize": 2, "fuse_quantized_matmul": 3, "fuse_quantized_experts": 2}
    assert rewrites == {"share_quantize": 2, **fused}
    # the shared expert runs while tokens travel: it is no rank's own
    apart = [note for p in graph.passes if p.name == "merge_shared_expert" for note in p.notes]
    stands = "apart: wait_tensor stands where grouped_matmul does in a mixture of experts"
    placed_apart = "apart: index stands where getitem does in a mixture of experts"
    assert any(stands in note for note in apart) == (mode == "dropless" and not placed)
    assert any(placed_apart in note for note in apart) == (mode == "dropless" and bool(placed))

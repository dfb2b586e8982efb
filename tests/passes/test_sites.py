"""Every node of a lowered graph says from which module and op it comes, and what that op should cost."""

import operator
from dataclasses import asdict

import pytest
import torch
from torch import fx, nn

import deepfuse as df
from deepfuse.ir.private import SITE
from deepfuse.ops.grouped_matmul import grouped_matmul
from deepfuse.ops.rms_norm import rms_norm
from deepfuse.passes.collective_call import collective_call
from deepfuse.passes.journal import Journal
from deepfuse.passes.lower import lower
from deepfuse.passes.pipeline import Pipeline
from deepfuse.passes.runner import Runner
from deepfuse.passes.sites import Site, module_of, number_sites
from graphs import trace
from tiny_model import tiny_model


def sites_of(name):
    return next(g.sites for g in tiny_model().report.journal.graphs if g.name == name)


def places(name):
    return {site.name for site in sites_of(name)}


def test_modules_and_ops_of_a_model():
    wanted = {
        "embed_tokens.embedding",
        "layers.0.input_layernorm.rms_norm",
        "layers.0.self_attn.q_b_proj.linear",
        "layers.0.mlp.down_proj.linear",
        "layers.1.mlp.gate.route",
        "layers.1.mlp.experts.grouped_matmul",
        "layers.1.mlp.shared_experts.swiglu",
        "lm_head.linear",
    }
    assert wanted | {"layers.1.self_attn.mla_attention"} <= places("prefill")
    # absorbed: the products beside the attention, too
    assert wanted | {"layers.1.self_attn.head_matmul", "layers.1.self_attn.mla_decode"} <= places("decode_1")


def test_what_a_fusion_made_is_named_by_its_own_op():
    # norm, rotary embedding and cache write, of which the pass made one op
    assert "layers.0.self_attn.norm_rope_append" in places("decode_1")
    assert "layers.0.self_attn.append_latent" not in places("decode_1")


def test_costs_are_those_of_the_op_in_free_sizes():
    norm = next(s for s in sites_of("prefill") if s.name == "layers.0.input_layernorm.rms_norm")
    x, weight = torch.empty(7, 32), torch.empty(32)
    cost = df.OPS["rms_norm"].cost(x, weight, 1e-6)
    assert norm.dtype == "float32"
    assert eval(norm.bytes, {"u0": 7}) == cost.bytes and eval(norm.flops, {"u0": 7}) == cost.flops


def test_calls_of_one_op_in_one_module_are_sites_of_their_own():
    graph = trace(lambda x, w: rms_norm(rms_norm(x, w, 1e-6), w, 1e-6), torch.randn(3, 8), torch.ones(8)).graph
    lower(graph, providers={})
    sites = number_sites(graph)
    assert [s.op for s in sites] == ["rms_norm", "rms_norm"]
    # the reference's nodes stand in the place of each
    computed = [n for n in graph.nodes if n.op == "call_function"]
    assert [n.meta[SITE] for n in computed] == sorted(n.meta[SITE] for n in computed)
    assert len(computed) > 2 and {n.meta[SITE] for n in computed} == {0, 1}


def test_a_kernel_that_stays_a_call_has_its_costs():
    x, weight, offsets = torch.randn(6, 8), torch.randn(2, 4, 8), torch.tensor([2, 6], dtype=torch.int32)
    graph = trace(grouped_matmul, x, weight, offsets).graph
    lower(graph, providers={})
    (site,) = number_sites(graph)
    cost = df.OPS["grouped_matmul"].cost(x, weight, offsets)
    assert site == Site(0, "", "grouped_matmul", "float32", str(cost.flops), str(cost.bytes))


def test_gradients_are_named_by_what_they_are_the_gradient_of():
    """Products by their module too, with their costs, and sums of gradients by the module of what they add."""

    def loss(x, w, v):
        return (rms_norm(x, w, 1e-6).tanh() @ v + x).sum()

    runner = Runner(Pipeline((lower,)), {"providers": {}})
    arguments = [torch.randn(*shape, requires_grad=True) for shape in ((3, 8), (8,), (8, 8))]
    torch.compile(loss, backend=runner.backend(), fullgraph=True)(*arguments).backward()
    backward = runner.journal.graphs[-1].sites
    names = [site.op for site in backward]
    assert "rms_norm_backward" in names and "tanh_backward" in names and not {"rsqrt", "pow", "mean"} & set(names)
    (product,) = (site for site in backward if site.op == "mm")
    # dh = dy @ v.T and dv = h.T @ dy
    assert product.flops == str(2 * 2 * 3 * 8 * 8) and product.bytes == str(2 * 4 * (3 * 8 + 8 * 8 + 3 * 8))
    assert product.dtype == "float32"


def test_each_collective_is_a_site_and_a_wait_knows_which_it_ends():
    c10d, graph = torch.ops._c10d_functional, fx.Graph()
    stack = {"model": ("L['model'].layers.3.mlp", nn.Module)}

    def add(target, *args):
        node = graph.call_function(target, args)
        node.meta = {"val": torch.empty(6, 4, dtype=torch.bfloat16), "nn_module_stack": stack}
        return node

    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(6, 4, dtype=torch.bfloat16)
    there = add(c10d.all_to_all_single.default, x, [3, 3], [3, 3], "ep")
    experts = add(c10d.wait_tensor.default, there)
    back = add(c10d.all_to_all_single.default, experts, [3, 3], [3, 3], "ep")
    several = add(c10d.all_reduce_coalesced.default, [x, experts], "sum", "dp")
    one_of_them = add(torch.ops.aten.view.default, add(operator.getitem, several, 1), [24])
    graph.output((add(c10d.wait_tensor.default, one_of_them), add(c10d.wait_tensor.default, back)))
    sites = [s for s in number_sites(graph) if s.op not in ("getitem", "view")]
    assert {s.module for s in sites} == {"layers.3.mlp"}
    at = {s.number: i for i, s in enumerate(sites)}
    assert [(s.op, s.group, s.dtype, s.message, at.get(s.start)) for s in sites] == [
        ("all_to_all_single", "ep", "bfloat16", "48", None),
        ("wait_tensor", "", "", None, 0),
        ("all_to_all_single", "ep", "bfloat16", "48", None),
        ("all_reduce_coalesced", "dp", "bfloat16", "96", None),
        ("wait_tensor", "", "", None, 3),
        ("wait_tensor", "", "", None, 2),
    ]


def test_a_wait_for_what_no_collective_gave_knows_none():
    graph = fx.Graph()
    x = graph.placeholder("x")
    for made in (
        graph.call_function(torch.ops.aten.cat.default, ([x, x],)),
        graph.call_function(torch.ops.aten.full.default, (), {"size": [2], "fill_value": 1}),
        x,
    ):
        wait = graph.call_function(torch.ops._c10d_functional.wait_tensor.default, (made,))
        assert collective_call(wait) == {"op": "wait_tensor", "start": None}


def node_at(stack, trace=""):
    node = fx.Graph().call_function(torch.sin)
    node.meta = {"nn_module_stack": {path: (path, nn.Module) for path in stack}, "stack_trace": trace}
    return node


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("L['model'].model.layers.3.self_attn.q_a_proj", "layers.3.self_attn.q_a_proj"),
        ("L['self'].model.layers[2].mlp", "layers.2.mlp"),
        ("L['model'].lm_head", "lm_head"),
        ("L['model']", ""),
        ("L['model'].model", ""),
    ],
)
def test_paths_without_the_name_of_the_model(path, wanted):
    assert module_of(node_at([path])) == wanted


def test_what_the_model_calls_itself_has_the_name_of_the_function():
    frames = [
        '  File "/a/runtime/engine.py", line 3, in decode\n    return model(x)\n',
        '  File "/a/blocks/model.py", line 9, in forward\n    return self.norm.add(x, h)\n',
        '  File "/a/blocks/norm.py", line 7, in add\n    return add_rms_norm(x, h)\n',
        '  File "/a/ir/op.py", line 5, in __call__\n    return self.overload(*args)\n',
    ]
    assert module_of(node_at(["L['model']"], "".join(frames))) == "norm.add"
    # in the model's own forward: the bare name of the model says nothing
    assert module_of(node_at(["L['model']"], "".join(frames[:2]))) == ""
    # nor does a collective's own file
    collective = '  File "/torch/distributed/_functional_collectives.py", line 5, in all_reduce\n    return x\n'
    assert module_of(node_at(["L['model']"], "".join(frames[:2]) + collective)) == ""
    assert module_of(node_at(["L['model']"])) == ""


def test_the_journal_keeps_them():
    journal = tiny_model().report.journal
    kept = Journal.from_json(journal.to_json())
    assert kept.graphs[0].sites == journal.graphs[0].sites
    assert Site(**asdict(kept.graphs[0].sites[0])) == kept.graphs[0].sites[0]

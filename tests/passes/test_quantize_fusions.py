"""The fusions of the stage ``quantize`` in a layer, in training, and on a CPU; near misses in words."""

import pytest
import torch

import deepfuse as df
from deepfuse.ops.add_rms_norm import add_rms_norm
from deepfuse.ops.expert_permute import expert_permute
from deepfuse.ops.quantize import quantize
from deepfuse.ops.rms_norm import rms_norm
from deepfuse.ops.swiglu import swiglu
from deepfuse.passes.fuse_norm_quantize import FuseNormQuantize
from deepfuse.passes.fuse_permute_quantize import FusePermuteQuantize
from deepfuse.passes.fuse_swiglu_quantize import FuseSwigluQuantize
from deepfuse.passes.lower import lower
from deepfuse.passes.runner import op_counts
from deepfuse.passes.share_quantize import share_quantize
from fp8 import assert_same_bits
from fp8_layer import E4M3, EPS, D, Layer, TrainedMLP
from graphs import rewritten, structure, trace

PASSES = (share_quantize, FuseNormQuantize, FuseSwigluQuantize, FusePermuteQuantize)
EXPERTS = torch.tensor([[0, 2], [3, 1], [2, 3]])


def counts(gm):
    return {name.split(".")[1]: n for name, n in op_counts(gm.graph).items() if name.startswith("deepfuse.")}


def to_fp8(x, rows=1, cols=128):
    return quantize(x, E4M3, rows, cols, False)


def built(module, *without, **options):
    pipeline = df.passes.default().without(*without)
    return df.build(module, device="cpu", passes=pipeline, strict=True, **({"compile": False} | options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_rewritten_bitwise(dtype):
    layer, inputs = Layer(dtype), [torch.randn(5, D).to(dtype) for _ in range(2)]
    fused = built(layer, verify=True)
    with torch.no_grad():
        got, want = fused(*inputs), built(layer, *(p.name for p in PASSES))(*inputs)
    assert_same_bits(got, want)
    (graph,) = fused.journal.graphs
    # shared: q_a and kv_a, gate and up; both norms before projections; routed and shared experts
    found = {p.name: p.rewrites for p in graph.passes if p.stage == "quantize"}
    assert [found[p.name] for p in PASSES] == [2, 2, 2, 1]
    before = graph.snapshots["after:fuse_permute_quantize"]
    assert before.count("ops.deepfuse.quantize.") == 0
    # only the router and the permutation read the second norm's y
    assert before.count("float8_e4m3fn, False, True)") == 1
    assert "rms_norm at rms_norm (fp8_layer.py:" in fused.explain("fuse_norm_quantize")


@torch.no_grad()
def test_each_alone_and_without_another():
    layer, inputs = Layer(), [torch.randn(5, D) for _ in range(2)]
    names, weights = zip(*layer.named_parameters(), strict=True)

    def fn(x, h, *weights):
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x, h))

    args = *inputs, *weights
    want = trace(fn, *args)(*args)
    for p in PASSES:
        for chosen in ([p], [q for q in PASSES if q is not p]):
            gm = trace(fn, *args)
            assert all(q(gm.graph) for q in chosen)
            gm.graph.eliminate_dead_code()
            gm.recompile()
            assert_same_bits(gm(*args), want)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch 2.11's Dynamo does
def test_training_keeps_what_the_backward_reads():
    module, x = TrainedMLP(), torch.randn(130, D)
    results = []
    for without in ((), tuple(p.name for p in PASSES)):
        model = built(module, *without, verify=True)
        module.zero_grad()
        given = x.clone().requires_grad_()
        y = model(given)
        y.square().sum().backward()
        results.append([y.detach(), given.grad, *(p.grad.clone() for p in module.parameters())])
        if not without:
            forward = model.journal.graphs[0]
            assert [p.rewrites for p in forward.passes if "_quantize" in p.name] == [0, 1, 1, 0, 3, 0, 0]
            # the weight gradients read y, quantized along tokens
            after = forward.snapshots["after:fuse_permute_quantize"]
            assert after.count("float8_e4m3fn, False, True)") == 2
    assert_same_bits(*results)


def test_on_a_cpu_a_fused_graph_becomes_the_unfused_one():
    # Inductor has the same freedom with the reference of a fused op as with those of its parts
    def fn(x, r, w, experts):
        y, h = add_rms_norm(x, r, w, EPS)
        rows, *places = expert_permute(y, experts, 4)
        return h, *to_fp8(y), *to_fp8(rows), *places, *to_fp8(swiglu(y, h)), *to_fp8(rms_norm(h, w, EPS))

    args = torch.randn(3, 200), torch.randn(3, 200), torch.randn(200), EXPERTS
    fused, plain = trace(fn, *args), trace(fn, *args)
    assert [p(fused.graph) for p in PASSES] == [0, 2, 1, 1]
    for gm in (fused, plain):
        lower(gm.graph, providers={})
        gm.graph.eliminate_dead_code()
        gm.recompile()
    # as sets of calls: a fused op stands where its results are first read
    assert op_counts(fused.graph) == op_counts(plain.graph)
    assert "aten.sort" not in str(structure(fused)), "few rows are permuted by comparing"
    assert_same_bits(fused(*args), plain(*args))


def test_results_that_nobody_reads_need_not_be_there():
    x, r, w = torch.randn(3, D), torch.randn(3, D), torch.randn(D)
    gm, count, _ = rewritten(FuseNormQuantize, lambda x, r, w: to_fp8(add_rms_norm(x, r, w, EPS)[0]), x, r, w)
    assert count == 1 and counts(gm) == {"add_rms_norm_quantize": 1}

    def only_values(x, experts):
        rows, _, inverse, _ = expert_permute(x, experts, 4)
        return to_fp8(rows)[0], inverse

    gm, count, _ = rewritten(FusePermuteQuantize, only_values, x, EXPERTS)
    assert count == 1 and counts(gm) == {"permute_quantize": 1}
    assert_same_bits(gm(x, EXPERTS), only_values(x, EXPERTS))


@pytest.mark.parametrize("experts", [4, 7, 256])
def test_any_number_of_experts(experts):
    x = torch.randn(3, D)

    def fn(x, chosen):
        rows, *places = expert_permute(x, chosen, experts)
        return *to_fp8(rows), *places

    gm, count, notes = rewritten(FusePermuteQuantize, fn, x, EXPERTS)
    assert count == 1, notes
    assert_same_bits(gm(x, EXPERTS), fn(x, EXPERTS))


def norm_of_three(x, w):
    return to_fp8(rms_norm(x.unflatten(0, (3, 1)), w, EPS).flatten(0, 1))


@pytest.mark.parametrize(
    ("rule", "fn", "dtype", "reason"),
    [
        (FuseNormQuantize, lambda x, w: to_fp8(rms_norm(x, w, EPS).exp()), torch.float32, "result of rms_norm is used by exp, rule wants it in quantize"),
        (FuseNormQuantize, lambda x, w: to_fp8(rms_norm(x, w, EPS), 128, 1), torch.float32, "rows is 128, rule wants 1"),
        (FuseNormQuantize, lambda x, w: quantize(rms_norm(x, w, EPS), torch.float8_e5m2, 1, 128, False), torch.float32, "quantize: dtype is torch.float8_e5m2, rule wants torch.float8_e4m3fn"),
        (FuseNormQuantize, norm_of_three, torch.float32, "result of rms_norm is used by view, rule wants it in quantize"),
        (FuseNormQuantize, lambda x, w: to_fp8(rms_norm(x, w, EPS)), torch.float64, "x has dtype float64, rule wants bfloat16 or float16 or float32"),
        (FuseSwigluQuantize, lambda x, w: to_fp8(swiglu(x, x).exp()), torch.float32, "result of swiglu is used by exp, rule wants it in quantize"),
        (FusePermuteQuantize, lambda x, w: (rows := expert_permute(x, x[:, :2].long(), 4)[0], *to_fp8(rows)), torch.float32, "result 0 of expert_permute has 2 users: quantize, output"),
    ],
    ids=["between", "block", "format", "view", "dtype", "swiglu", "rows"],
)  # fmt: skip
def test_near_misses_say_why(rule, fn, dtype, reason):
    _, count, notes = rewritten(rule, fn, torch.randn(3, D, dtype=dtype), torch.randn(D, dtype=dtype))
    assert count == 0 and notes[0].endswith(reason), notes

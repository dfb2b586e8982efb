"""One quantize for all readers: what is shared, what is not, and that a rule behind it finds one call."""

import pytest
import torch

from deepfuse.ops.dequantize import dequantize
from deepfuse.ops.quantize import quantize
from deepfuse.passes.fuse_norm_quantize import FuseNormQuantize
from deepfuse.passes.share_quantize import share_quantize
from fp8 import assert_same_bits
from fp8_layer import E4M3, EPS
from graphs import assert_same_graph, rewritten, trace

X = torch.randn(3, 256)


def rounded(x, rows=1, cols=128, power_of_two=False):
    return dequantize(*quantize(x, E4M3, rows, cols, power_of_two), rows, cols, torch.float32)


def shared(fn, *args):
    return rewritten(share_quantize, fn, *args)


def test_before_becomes_expected():
    def before(x):
        return rounded(x), rounded(x), quantize(x, E4M3, 1, 128, False)[1]

    def after(x):
        values, scale = quantize(x, E4M3, 1, 128, False)
        return (*(dequantize(values, scale, 1, 128, torch.float32) for _ in range(2)), scale)

    gm, count, notes = shared(before, X)
    assert count == 2 and [n.partition(": ")[2].split(" at")[0] for n in notes[1:]] == ["shared with that"] * 2
    assert_same_graph(gm, trace(after, X))
    assert_same_bits(gm(X), before(X))
    assert share_quantize(gm.graph) == 0


def test_readers_of_equal_views_share():
    _, count, _ = shared(lambda x: (rounded(x.view(6, 128)), rounded(x.view(6, 128)), rounded(x.view(2, 384))), X)
    assert count == 1


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (lambda x: rounded(x, 128, 1), "it is float8_e4m3fn in 128x1, that at quantize is float8_e4m3fn in 1x128"),
        (lambda x: rounded(x, power_of_two=True), "it is float8_e4m3fn in 1x128 by powers of two, that"),
        (lambda x: quantize(x, torch.float8_e5m2, 1, 128, False)[0], "it is float8_e5m2 in 1x128, that"),
        (lambda x: rounded(x + 0.5), "it is the first of its operand"),
        (lambda x: rounded(x[:2]), "it is the first of its operand"),
    ],
    ids=["block", "scale", "format", "operand", "view"],
)
def test_others_stay_and_say_why(other, reason):
    _, count, notes = shared(lambda x: (rounded(x), other(x)), X)
    assert count == 0 and f"stays: {reason}" in notes[1]


def test_results_are_read_before_those_of_the_first_were_taken():
    # the first call's results are taken late, the second's are read at once
    graph = torch.fx.Graph()
    like = trace(lambda x: quantize(x, E4M3, 1, 128, False), X)
    x = graph.placeholder("x")
    x.meta["val"] = next(n for n in like.graph.nodes if n.op == "placeholder").meta["val"]
    calls = [graph.call_function(quantize.overload, (x, E4M3, 1, 128, False)) for _ in range(2)]
    early = graph.call_function(torch.ops.aten.clone.default, (graph.call_function(get(), (calls[1], 0)),))
    late = [graph.call_function(get(), (calls[0], i)) for i in range(2)]
    graph.output((early, *late))
    assert share_quantize(graph) == 1
    graph.lint()
    results = torch.fx.GraphModule(torch.nn.Module(), graph)(X)
    assert_same_bits(results[1:], quantize(X, E4M3, 1, 128, False))


def get():
    import operator

    return operator.getitem


def test_a_norm_finds_one_quantize():
    from deepfuse.ops.rms_norm import rms_norm

    def before(x, w):
        y = rms_norm(x, w, EPS)
        return rounded(y), rounded(y)

    gm, count, _ = shared(before, X, torch.randn(256))
    assert count == 1 and FuseNormQuantize(gm.graph) == 1

"""Products of one input become one where their weights lie side by side, and nowhere else."""

import pytest
import torch

from deepfuse.ir.verify import verify, verify_types
from deepfuse.ops.dequantize import dequantize
from deepfuse.ops.linear import linear
from deepfuse.ops.quantize import quantize
from deepfuse.passes.check_values import Rewritten, copied
from deepfuse.passes.journal import noting
from deepfuse.passes.merge_projections import merge_projections
from deepfuse.passes.runner import op_counts
from graphs import assert_same_graph, trace

E4M3 = torch.float8_e4m3fn
K = 256
X = torch.randn(3, K)


def beside(*parts):
    """Copies of matrices, one behind the other in one storage."""
    return torch.cat(parts).split([len(p) for p in parts])


def merged(fn, *args, layout="as they are"):
    gm = trace(fn, *args)
    before = copied(gm.graph)
    notes = []
    with noting(notes):
        count = merge_projections(gm.graph, layout=layout)
    gm.graph.eliminate_dead_code()
    verify(gm.graph)
    verify_types(gm.graph)
    gm.recompile()
    after = copied(gm.graph)
    assert Rewritten("merge_projections", "reassociating", count, before, after).problem(args) is None
    return gm, count, notes


def two(x, a, b):
    return linear(x, a, None), linear(x, b, None)


def test_before_becomes_expected():
    def after(x, a, b):
        y = linear(x, torch.as_strided(a, [12, K], [K, 1], 0), None)
        return y[:, :5], y[:, 5:12]

    a, b = beside(torch.randn(5, K), torch.randn(7, K))
    gm, count, notes = merged(two, X, a, b)
    assert (count, notes) == (1, ["linear at linear and linear_1: merged"])
    expected = trace(lambda x, a, b: after(x, a, b), X, a, b)
    assert_same_graph(gm, expected)
    assert merge_projections(gm.graph, layout="as they are") == 0


def test_in_the_order_of_memory_whatever_that_of_the_graph():
    a, b, c = beside(*(torch.randn(n, K) for n in (5, 6, 7)))
    gm, count, _ = merged(lambda x, c, a, b: (linear(x, c, None), linear(x, a, None), linear(x, b, None)), X, c, a, b)
    assert count == 2 and op_counts(gm.graph)["deepfuse.linear.default"] == 1


def test_views_behind_a_product_know_their_strides():
    def fn(x, a, b):
        left, right = linear(x, a, None).split([4, 4], -1)
        return left.unflatten(-1, (2, 2)).transpose(0, 1) * 2, right.unsqueeze(1), linear(x, b, None).exp()

    _, count, _ = merged(fn, X, *beside(torch.randn(8, K), torch.randn(7, K)))
    assert count == 1


def fp8(*rows, k=K):
    """Weights and their scales."""
    quantized = [quantize(torch.randn(n, k) * k**-0.5, E4M3, 128, 128, False) for n in rows]
    weights = beside(*(values.view(torch.uint8) for values, _ in quantized))
    return *(w.view(E4M3) for w in weights), *beside(*(scale for _, scale in quantized))


def weight_only(x, a, b, sa, sb):
    return tuple(linear(x, dequantize(w, s, 128, 128, x.dtype), None) for w, s in ((a, sa), (b, sb)))


def online(x, a, b, sa, sb):
    def product(w, s):
        given = dequantize(*quantize(x, E4M3, 1, 128, False), 1, 128, torch.float32)
        return linear(given, dequantize(w, s, 128, 128, torch.float32), None).to(x.dtype)

    return product(a, sa), product(b, sb)


def test_weights_in_the_middle_of_memory_are_read_through_the_input_that_begins_there():
    def after(x, first, a, b):
        y = linear(x, torch.as_strided(first, [12, K], [K, 1], 6 * K), None)
        return y[:, :5], y[:, 5:12], first * 2

    first, a, b = torch.randn(18, K).split([6, 5, 7])
    first = first.view(2, 3, K)
    gm, count, _ = merged(lambda x, first, a, b: (*two(x, a, b), first * 2), X, first, a, b)
    assert count == 1
    assert_same_graph(gm, trace(lambda x, first, a, b: after(x, first, a, b), X, first, a, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fn", [weight_only, online])
def test_fp8_weights_and_their_scales(fn, dtype):
    gm, count, notes = merged(fn, X.to(dtype), *fp8(256, 70))
    assert count == 1, notes
    counts = op_counts(gm.graph)
    assert counts["deepfuse.linear.default"] == 1
    # of the weight; and of the activation
    assert counts["deepfuse.dequantize.default"] == (1 if fn is weight_only else 2)
    if fn is online and dtype == torch.bfloat16:
        # the conversion stays behind the product, where a fused one takes it in
        (product,) = gm.graph.find_nodes(op="call_function", target=linear.overload)
        (user,) = product.users
        assert user.target in (torch.ops.prims.convert_element_type.default, torch.ops.aten._to_copy.default)


def test_fp8_blocks_must_end_with_a_weight():
    _, count, notes = merged(weight_only, X, *fp8(200, 70))
    assert count == 0 and "200 rows are no multiple of 128: a scale would be of rows of both" in notes[0]


W5, W7 = torch.randn(5, K), torch.randn(7, K)


@pytest.mark.parametrize(
    ("fn", "args", "reason"),
    [
        (two, (W5, W7), "each has memory of its own"),
        (two, torch.cat([W5, W5[:1], W7]).split([5, 1, 7])[::2], "it begins 256 elements behind the first one's end"),
        (two, torch.cat([W5[:1], W5, W7]).split([1, 5, 7])[1:], "no input begins where the memory of the first weight does"),
        (two, torch.randn(K, 12).t().split([5, 7]), "the rows of its weight lie apart"),
        (lambda x, a, b: (linear(x, a, None), linear(x, b * 2, None)), beside(W5, W7), "its weight is computed"),
        (lambda x, a, b: (linear(x, a, a[:, 0]), linear(x, b, b[:, 0])), beside(W5, W7), "it has a bias"),
        (lambda x, a, b: (linear(x, a, None).view(-1), linear(x, b, None)), beside(W5, W7), "a view of a result needs its rows side by side"),
    ],
    ids=["memory", "gap", "beginning", "transposed", "computed", "bias", "view"],
)  # fmt: skip
def test_what_stays_apart_and_why(fn, args, reason):
    _, count, notes = merged(fn, X, *args)
    assert count == 0 and any(reason in note for note in notes), notes


def test_products_of_different_inputs_stay_apart():
    _, count, notes = merged(lambda x, a, b: (linear(x, a, None), linear(x + 1, b, None)), X, *beside(W5, W7))
    assert (count, notes) == (0, [])


def test_without_the_callers_word_nothing_is_merged():
    _, count, notes = merged(two, X, *beside(W5, W7), layout="")
    assert count == 0 and notes[0].endswith("nobody says that the weights lie side by side at every call")

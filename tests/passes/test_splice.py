"""What is spliced in computes the same, and nothing twice."""

import pytest
import torch

from deepfuse.ops.linear import linear
from deepfuse.ops.rms_norm import rms_norm
from deepfuse.passes.lower import lower
from graphs import trace


def lowered(fn, *args):
    gm = trace(fn, *args)
    lower(gm.graph, providers={})
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


def count(gm, name):
    return sum(name in str(n.target) for n in gm.graph.nodes if n.op == "call_function")


def test_two_products_of_one_vector_share_its_copy_in_memory():
    x, a, b = torch.randn(1, 32, dtype=torch.bfloat16), *torch.randn(2, 16, 32, dtype=torch.bfloat16)

    def two(x, a, b):
        y = rms_norm(x, torch.ones(32, dtype=torch.bfloat16), 1e-6)
        return linear(y, a, None), linear(y, b, None)

    gm = lowered(two, x, a, b)
    assert count(gm, "force_stride_order") == 1, gm.graph
    for got, want in zip(gm(x, a, b), two(x, a, b), strict=True):
        # sums of 32 products in float32, then rounded: one unit of bfloat16 apart at most
        torch.testing.assert_close(got, want, atol=0, rtol=2**-7)


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_calls_that_differ_in_one_argument_stay_apart(factor):
    x, weight = torch.randn(3, 8), torch.ones(8)

    def two(x, weight):
        return rms_norm(x, weight, 1e-6), rms_norm(x, weight, 1e-6 * factor)

    gm = lowered(two, x, weight)
    assert count(gm, "rsqrt") == (1 if factor == 1.0 else 2)

"""The router's product reads narrow operands, where nobody else reads the wide ones; on a CPU nothing changes."""

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import deepfuse as df
import graphs
from deepfuse.ir.private import inductor_decompositions
from deepfuse.ops.linear import MATVEC_ROWS, linear
from deepfuse.ops.router_logits import router_logits
from deepfuse.passes.fuse_router_logits import FuseRouterLogits
from deepfuse.passes.lower import lower

BF16 = torch.bfloat16


def decomposed(fn, *args):
    """The graph as Inductor's hooks see it: a conversion is an op of its own."""
    return make_fx(fn, tracing_mode="fake", decomposition_table=dict(inductor_decompositions()))(*args)


def rewritten(fn, *args):
    return graphs.rewritten(FuseRouterLogits, decomposed(fn, *args), *args)


def logits_of(x, weight):
    return linear(x.float(), weight.float(), None)


@pytest.mark.parametrize("tokens", [1, MATVEC_ROWS, MATVEC_ROWS + 1])
def test_on_a_cpu_the_lowered_graph_is_as_without(tokens):
    args = torch.randn(tokens, 32).to(BF16), torch.randn(8, 32).to(BF16)
    fused, count, _ = rewritten(logits_of, *args)
    assert count == 1
    plain = decomposed(logits_of, *args)
    for gm in (fused, plain):
        lower(gm.graph, providers={})
        gm.graph.eliminate_dead_code()
        gm.recompile()
    graphs.assert_same_graph(fused, plain)
    assert torch.equal(fused(*args), plain(*args))


@pytest.mark.parametrize("again", [0, 1], ids=["x", "weight"])
def test_an_operand_that_others_read_wide_stays_wide(again):
    def fn(*narrow):
        wide = [t.float() for t in narrow]
        return linear(*wide, None), wide[again].exp()

    args = torch.randn(3, 32).to(BF16), torch.randn(8, 32).to(BF16)
    fused, count, notes = rewritten(fn, *args)
    assert count == 1, notes
    (node,) = fused.graph.find_nodes(op="call_function", target=router_logits.overload)
    dtypes = [arg.meta["val"].dtype for arg in node.args]
    assert dtypes == [torch.float32 if i == again else BF16 for i in range(2)]
    assert all(torch.equal(got, want) for got, want in zip(fused(*args), fn(*args), strict=True))


def both_read_again(x, weight):
    wide = x.float(), weight.float()
    return linear(*wide, None), wide[0].exp(), wide[1].exp()


@pytest.mark.parametrize(
    ("fn", "dtypes", "reason"),
    [
        (both_read_again, (BF16, BF16), "has 2 users: linear, exp"),
        (lambda x, w: linear(x.float(), w.float(), w[:, 0].float()), (BF16, BF16), "rule wants None"),
        (lambda x, w: linear(x.double(), w.double(), None), (BF16, BF16), "rule wants torch.float32"),
        (logits_of, (torch.float32, torch.float32), "rule wants convert_element_type"),
        (logits_of, (torch.float64, torch.float64), "x has dtype float64, rule wants"),
        (lambda x, w: linear(x, w, None), (BF16, BF16), "rule wants convert_element_type"),
    ],
    ids=["read again", "bias", "to float64", "in float32", "from float64", "narrow product"],
)
def test_near_misses_say_why(fn, dtypes, reason):
    args = torch.randn(3, 32).to(dtypes[0]), torch.randn(8, 32).to(dtypes[1])
    _, count, notes = rewritten(fn, *args)
    assert count == 0 and reason in notes[0], notes


def test_training_keeps_the_wide_operands():
    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 32).to(BF16))

        def forward(self, x):
            return logits_of(x, self.weight)

    router = df.build(Router(), device="cpu", compile=False, strict=True, verify=True)
    x = torch.randn(3, 32).to(BF16).requires_grad_()
    router(x).sum().backward()
    (graph,) = {line for line in router.explain("fuse_router_logits").splitlines() if "linear at" in line}
    assert "users" in graph


@pytest.mark.parametrize("shape", [(32,), (2, 3, 32)])
def test_rows_of_other_dimensions_stay(shape):
    args = torch.randn(shape).to(BF16), torch.randn(8, 32).to(BF16)
    fused, count, notes = rewritten(logits_of, *args)
    assert count == 0 and notes[0].endswith(f"x has {len(shape)} dimensions, rule wants 2")
    assert torch.equal(fused(*args), logits_of(*args))

"""Calls that give back their operand go; those that only seem to stay."""

import pytest
import torch

import deepfuse  # noqa: F401 - the backend
from deepfuse.ir.private import storage_id
from deepfuse.passes.eliminate_no_ops import eliminate_no_ops
from graphs import assert_same_graph, trace

x = torch.tensor([[0.0, -0.0, 2.5], [float("nan"), float("inf"), -1.0]])
i = torch.arange(6).reshape(2, 3)
aten = torch.ops.aten


def rewritten(fn, *args):
    gm = trace(fn, *args)
    count = eliminate_no_ops(gm.graph)
    gm.recompile()
    return gm, count


@pytest.mark.parametrize(
    ("fn", "given"),
    [
        (lambda y: y * 1.0, x),
        (lambda y: y / 1, x),
        (lambda y: y + 0, i),
        (lambda y: y - 0, i),
        (lambda y: aten.view.default(y, [2, 3]), x),
        (lambda y: aten.permute.default(y, [0, -1]), x),
        (lambda y: aten.slice.Tensor(y, 0, 0, 9), x),
        (lambda y: aten.expand.default(y, [2, 3]), x),
        (lambda y: y.neg().clone(), x),
    ],
)
def test_no_ops_go(fn, given):
    gm, count = rewritten(lambda y: fn(y).abs(), given)
    assert count == 1
    assert torch.equal(gm(given).nan_to_num(), fn(given).abs().nan_to_num())
    assert eliminate_no_ops(gm.graph) == 0


@pytest.mark.parametrize(
    ("fn", "given"),
    [
        (lambda y: y + 0.0, x),  # -0.0 becomes 0.0
        (lambda y: y * 1.0, i),  # a float
        (lambda y: y * 2.0, x),
        (lambda y: y[:, ::2], x),
        (lambda y: y.t(), torch.ones(2, 2)),
        (lambda y: y.clone(), x),  # the input may be written to
        (lambda y: y[1:].clone(), x),  # and so what it is seen as
    ],
)
def test_others_stay(fn, given):
    gm, count = rewritten(lambda y: fn(y).abs(), given)
    assert count == 0
    assert_same_graph(gm, trace(lambda y: fn(y).abs(), given))


@pytest.mark.parametrize("copy", [lambda y: y.clone(), lambda y: y * 1.0], ids=["clone", "product"])
def test_a_copy_that_the_caller_gets_through_a_view_stays(copy):
    def fn(y):
        given = copy(y[1:]).view(-1)
        y.add_(1)
        return given

    compiled = torch.compile(fn, backend="deepfuse", options={"compile": False})
    y = torch.ones(3, 2)
    result = compiled(y)
    assert torch.equal(result, torch.ones(4)) and torch.equal(y, torch.full((3, 2), 2.0))
    assert storage_id(result) != storage_id(y)


def test_an_output_of_the_graph_stays_a_tensor_of_its_own():
    _, count = rewritten(lambda y: y * 1.0, x)
    assert count == 0

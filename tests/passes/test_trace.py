"""Traces beside those of ``make_fx``, which takes more and longer; sizes; what is refused."""

import re

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from deepfuse.ir.op import OPS
from deepfuse.ir.private import inductor_decompositions
from deepfuse.ir.provider import REFERENCE
from deepfuse.ops import import_ops
from deepfuse.passes.trace import trace

import_ops()

aten = torch.ops.aten


def called(graph: fx.Graph) -> list[str]:
    # an alias, or a detached tensor, is the tensor itself
    skip = ("aten.alias.default", "aten.detach.default")
    # make_fx leaves a write in place where the function has one
    names = [str(node.target).replace("_.", ".") for node in graph.nodes if node.op == "call_function"]
    return [name for name in names if name not in skip]


def of_tensors(fn, args):
    def run(*given):
        left = iter(given)
        return fn(*(next(left) if isinstance(a, Tensor) else a for a in args))

    return run, [a for a in args if isinstance(a, Tensor)]


def free_sizes(*sizes: int) -> tuple[FakeTensorMode, list[Tensor]]:
    """A fake mode, and vectors whose lengths are free."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    return mode, [
        mode.from_tensor(torch.ones(size), source=ConstantSource(f"size_{i}"), symbolic_context=context)
        for i, size in enumerate(sizes)
    ]


TRACED = [op for op in OPS.values() if op.functional or any(p.name == REFERENCE and p.inline for p in op.providers)]


@pytest.mark.parametrize("op", TRACED, ids=lambda op: op.name)
def test_a_reference_is_traced_as_make_fx_does(op):
    args = next(iter(op.samples(torch.device("cpu"), torch.bfloat16)))
    fn, tensors = of_tensors(op.functional or op.reference, args)
    graph = trace(fn, tensors, FakeTensorMode())

    with FakeTensorMode():
        fakes = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype) for t in tensors]
        oracle = make_fx(fn, decomposition_table=dict(inductor_decompositions()))(*fakes).graph
    oracle.eliminate_dead_code()
    assert called(graph) == called(oracle)
    ours, theirs = ([n.meta["val"] for n in g.output_node().all_input_nodes] for g in (graph, oracle))
    assert [(v.shape, v.stride(), v.dtype) for v in ours] == [(v.shape, v.stride(), v.dtype) for v in theirs]


def test_sizes_are_those_of_the_inputs_or_computed_from_them():
    mode, (x, y) = free_sizes(6, 7)
    graph = trace(lambda x, y: x.new_zeros(-x.shape[0] % 4 + (y.shape[0] + 127) // 128), [x, y], mode)
    for sizes in ((6, 7), (8, 129), (5, 128)):
        (length,) = fx.GraphModule({}, graph)(*map(torch.ones, sizes)).shape
        assert length == -sizes[0] % 4 + (sizes[1] + 127) // 128


def test_a_factor_of_a_size_is_found_by_division():
    mode, (x,) = free_sizes(6)
    with mode:
        rows = x.new_empty(3 * x.shape[0], 2)
    graph = trace(lambda rows: rows.new_zeros(rows.shape[0] // 3), [rows], mode)
    assert fx.GraphModule({}, graph)(torch.ones(27, 2)).shape == (9,)


def test_a_multiple_of_what_is_left_behind_a_split_is_found():
    mode, (x,) = free_sizes(7)
    with mode:
        left = x.new_empty(x.shape[0] - x.shape[0] // 2)
        rows = x.new_empty(3 * left.shape[0])
    graph = trace(lambda left: left.new_zeros(3 * left.shape[0]), [left], mode)
    assert fx.GraphModule({}, graph)(torch.ones(5)).shape == (15,)
    graph = trace(lambda rows: rows.new_zeros(rows.shape[0] // 3), [rows], mode)
    assert fx.GraphModule({}, graph)(torch.ones(15)).shape == (5,)


def test_a_product_of_sizes_is_as_good_as_a_size():
    mode, (x, y) = free_sizes(6, 7)
    with mode:
        rows = x.new_empty(x.shape[0] * y.shape[0], 2)
    graph = trace(lambda rows: rows.new_zeros((rows.shape[0] + 3) // 4 * 4), [rows], mode)
    assert fx.GraphModule({}, graph)(torch.ones(42, 2)).shape == (44,)


def test_what_is_computed_of_a_size_with_the_other_sign_is_computed_from_it():
    # rows of a capacity, ceil(24 T / 10) for each of 10 experts, filled up to fours: sympy has -10 * (-12 T // 5), and its
    # remainder without the signs
    mode, (x,) = free_sizes(7)
    with mode:
        rows = torch.empty(10 * -(-12 * x.shape[0] // 5), 2)
    graph = trace(lambda rows: rows.new_zeros(-rows.shape[0] % 4 + rows.shape[0]), [rows], mode)
    for count in (170, 0, 10):
        assert fx.GraphModule({}, graph)(torch.ones(count, 2)).shape == (-(-count // 4) * 4,)


def test_a_multiple_of_a_sum_of_sizes_is_computed_from_the_sum():
    # rows that came from several processes: sympy writes 24 * (a + b) as 24 * a + 24 * b, and has neither
    mode, (x, y) = free_sizes(6, 7)
    with mode:
        rows = torch.empty(x.shape[0] + y.shape[0], 2)
    graph = trace(lambda rows: rows.new_zeros(rows.shape[0] * 24 + 5), [rows], mode)
    for count in (13, 1, 0):
        assert fx.GraphModule({}, graph)(torch.ones(count, 2)).shape == (24 * count + 5,)


def test_a_size_of_something_else_is_refused():
    mode, (x, y) = free_sizes(6, 7)
    length = y.shape[0]
    with pytest.raises(ValueError, match="^trace: want sizes that follow from those of the tensors, got s"):
        trace(lambda x: x.new_zeros(length), [x], mode)


def test_one_tensor_given_twice_is_two_inputs():
    x = torch.ones(3)
    graph = trace(torch.sub, [x, x], FakeTensorMode())
    assert [node.op for node in graph.nodes] == ["placeholder", "placeholder", "call_function", "output"]
    assert len(graph.find_nodes(op="call_function", target=aten.sub.Tensor)[0].all_input_nodes) == 2


def test_what_is_written_in_place_is_functional():
    graph = trace(lambda x: (x + 1).mul_(2).add_(x), [torch.ones(3)], FakeTensorMode())
    assert called(graph) == ["aten.add.Tensor", "aten.mul.Tensor", "aten.add.Tensor"]
    x = torch.arange(3.0)
    assert torch.equal(fx.GraphModule({}, graph)(x), (x + 1) * 2 + x)


def test_new_memory_may_be_written_into_whole():
    def doubled(x):
        y = torch.empty_like(x)
        y.copy_(x + 1)
        return y * 2

    graph = trace(doubled, [torch.ones(3)], FakeTensorMode())
    x = torch.arange(3.0)
    assert torch.equal(fx.GraphModule({}, graph)(x), (x + 1) * 2)


def test_what_is_written_in_place_is_rounded_to_what_it_is_written_to():
    graph = trace(
        lambda x, y: x.clone().add_(y), [torch.ones(3, dtype=torch.bfloat16), torch.ones(3)], FakeTensorMode()
    )
    x, y = torch.full((3,), 1.0, dtype=torch.bfloat16), torch.full((3,), 2**-9)
    got = fx.GraphModule({}, graph)(x, y)
    assert got.dtype == torch.bfloat16 and torch.equal(got, x.clone().add_(y))


def test_a_number_computed_of_a_free_size_is_part_of_the_graph():
    mode, (x,) = free_sizes(6)
    graph = trace(lambda x: x * x.shape[0] ** -0.5, [x], mode)
    assert torch.equal(fx.GraphModule({}, graph)(torch.ones(16)), torch.full((16,), 0.25))


def test_a_result_that_an_op_leaves_out_is_none():
    def input_gradient(dy, x, weight):
        options = (None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, False, False])
        return aten.convolution_backward.default(dy, x, weight, *options)[0]

    given = [torch.ones(1, 2, 5, 5), torch.ones(1, 2, 5, 5), torch.ones(2, 2, 1, 1)]
    graph = trace(input_gradient, given, FakeTensorMode())
    assert torch.equal(fx.GraphModule({}, graph)(*given), torch.full((1, 2, 5, 5), 2.0))


CONSTANT = torch.ones(3)


@pytest.mark.parametrize(
    ("fn", "problem"),
    [
        (lambda x: x + CONSTANT, "without tensor constants, got one of shape (3,)"),
        (lambda x: x + torch.tensor([1.0, 2.0, 3.0]), "without tensor constants, got one of shape (3,)"),
        (lambda x: x.add_(1), "that writes into nothing it is given, nor a part, got a call of aten.add_.Tensor"),
        (
            lambda x: x.detach().add_(1),
            "that writes into nothing it is given, nor a part, got a call of aten.add_.Tensor",
        ),
        (lambda x: (x + 1)[:2].zero_(), "that writes into nothing it is given, nor a part, got a call of aten.zero_."),
        (lambda x: x[:2].zero_(), "that writes into nothing it is given, nor a part, got a call of aten.zero_.default"),
        (
            lambda x: torch.add(x, x, out=torch.empty(3)),
            "that writes into nothing it is given, nor a part, got a call of aten.add.out",
        ),
    ],
    ids=["global", "constant", "input", "alias", "part", "view", "out"],
)
def test_what_is_no_graph_of_values_is_refused(fn, problem):
    with pytest.raises(ValueError, match=f"^trace: want a function {re.escape(problem)}"):
        trace(fn, [torch.ones(3)], FakeTensorMode())

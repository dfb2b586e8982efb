"""The rule by which launches and bytes are counted, on graphs small enough to count by hand."""

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from torch import Tensor, fx
from torch._functorch.aot_autograd import aot_function
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import deepfuse.ops.absorb_query
import deepfuse.ops.mla_decode_project  # noqa: F401 - defines the op
from decode_arguments import decode_arguments
from deepfuse.ops.append_latent import append_latent
from deepfuse.ops.quantize import quantize
from deepfuse.ops.rms_norm import rms_norm_ref
from deepfuse.passes.check_values import copied
from deepfuse.passes.lower import lower
from deepfuse.profiling.regions import Launch, launches
from graphs import trace

F4 = 4
"""Bytes of a float32, which everything here is."""


def counted(fn: Callable[..., Any], *args: Tensor, weights: tuple[int, ...] = ()) -> list[Launch]:
    graph = trace(fn, *args).graph
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    return launches(graph, [inputs[i] for i in weights])


def regions(fn: Callable[..., Any], *args: Tensor, weights: tuple[int, ...] = ()) -> list[tuple[str, int]]:
    """Kind and bytes of activations of each launch."""
    return [(launch.kind, launch.activation_bytes) for launch in counted(fn, *args, weights=weights)]


X = torch.randn(8, 16)
N = X.numel() * F4
W = torch.randn(16, 16)


def test_a_chain_is_one_region_that_reads_and_writes_its_ends() -> None:
    assert regions(lambda x: (x + 1).relu() * 2, X) == [("region", 2 * N)]


def test_a_result_that_only_loops_read_is_not_stored() -> None:
    # of three results the middle one is read twice, and computed twice: y is never written
    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.exp()
        return y.sum(0), y[:, :2] + 1

    # sums over 8 rows of 16, and 16 elements: the sizes fit, both read x, and y[:, :2] looks at what is read anyway
    assert regions(fn, X) == [("region", N + 16 * F4 + 16 * F4)]


def test_a_norm_is_one_region() -> None:
    found = counted(lambda x, w: rms_norm_ref(x, w, 1e-6), X, torch.randn(16), weights=(1,))
    assert [(launch.kind, launch.activation_bytes, launch.weight_bytes) for launch in found] == [
        ("region", 2 * N, 16 * F4)
    ]


def test_two_reductions_of_different_sizes_are_two_regions() -> None:
    def fn(x: Tensor) -> Tensor:
        x = x / x.amax(-1, keepdim=True)
        groups = x.view(8, 4, 4)
        return groups / groups.amax(-1, keepdim=True)

    # the first divides where the second reads, so it is the row's maximum that is stored: 8 numbers, written and read
    assert regions(fn, X) == [("region", N + 8 * F4), ("region", N + 8 * F4 + N)]


def test_what_a_matrix_product_needs_is_stored_and_loops_on_either_side_stay_apart() -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        y = x.relu()
        return y + y @ w

    found = counted(fn, X, W, weights=(1,))
    assert [(launch.kind, launch.activation_bytes) for launch in found] == [
        ("region", 2 * N),
        ("matmul", 2 * N),
        ("region", 3 * N),
    ]
    assert [launch.weight_bytes for launch in found] == [0, 16 * 16 * F4, 0]


def test_loops_that_do_not_wait_for_the_product_go_with_those_before_it() -> None:
    def fn(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = x.relu()
        return y @ w, y + 1

    assert regions(fn, X, W, weights=(1,)) == [("region", 3 * N), ("matmul", 2 * N)]


def test_loops_that_read_the_same_tensor_share_a_region_and_its_reading() -> None:
    assert regions(lambda x: (x + 1, x * 2), X) == [("region", 3 * N)]
    # of equal sizes, but with nothing in common
    assert regions(lambda x, y: (x + 1, y * 2), X, X.clone()) == [("region", 2 * N)] * 2


def test_a_region_does_not_wait_for_what_waits_for_it() -> None:
    def fn(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a = x + 1
        b = a[:3, :5] * 2
        # reads a, and is as large, but b is in between
        return a, b, a + b.sum()

    found = counted(fn, X)
    assert [launch.name for launch in found] == ["add", "mul + sum", "add"]


def test_bytes_are_what_is_looked_at() -> None:
    assert regions(lambda x: x[:, :4] + 1, X) == [("region", 2 * 8 * 4 * F4)]
    assert regions(lambda x: x[:1].expand(8, 16) + 1, X) == [("region", 16 * F4 + N)]
    index = torch.tensor([1, 1, 5])
    assert regions(lambda x, i: x[i] + 1, X, index) == [("region", 2 * 3 * 16 * F4 + 3 * 8)]
    # no more than there is
    many = torch.zeros(100, dtype=torch.int64)
    assert regions(lambda x, i: x[i] + 1, X, many) == [("region", N + 100 * 8 + 100 * 16 * F4)]
    # the whole where something else reads it as well
    assert regions(lambda x, i: (x[i], x + 1), X, torch.arange(8)) == [("region", N + 8 * 8 + 2 * N)]


def test_a_write_into_a_tensor_moves_what_is_written() -> None:
    def fn(cache: Tensor, slots: Tensor, x: Tensor) -> Tensor:
        return torch.ops.aten.index_put(cache, [slots], x * 2)

    cache = torch.zeros(1000, 16)
    assert regions(fn, cache, torch.arange(8), X) == [("region", 8 * 8 + 2 * N)]

    def back(cache: Tensor, slots: Tensor, x: Tensor) -> None:
        cache.copy_(torch.ops.aten.index_put(cache, [slots], x * 2))

    assert regions(back, cache, torch.arange(8), X) == [("region", 8 * 8 + 2 * N)]


def test_a_copy_into_an_input_costs_where_nothing_can_write_there_itself() -> None:
    assert regions(lambda x, y: x.copy_(y + 1), X, X.clone()) == [("region", 2 * N)]
    assert regions(lambda x, y: x.copy_(y), X, X.clone()) == [("region", 2 * N)]
    found = regions(lambda x, y, w: x.copy_(y @ w), X, X.clone(), W, weights=(2,))
    assert found == [("matmul", 2 * N), ("region", 2 * N)]


def test_of_a_weight_an_op_may_read_a_part() -> None:
    # kv_b_proj of two heads: the first 8 rows of each are the query's, the others the values'
    q_latent, q_rope, cache, table, seqlens, scale = decode_arguments([70], 2, 2, 16, 8)
    weight, cos, sin = torch.randn(2 * (8 + 24), 16), torch.ones(1, 4), torch.zeros(1, 4)
    ops: Any = torch.ops.deepfuse

    def query(*given: Tensor) -> Any:
        *tensors, weight = given
        return ops.absorb_query.triton(*tensors, True, weight, None)

    def attend(*given: Tensor) -> Any:
        *tensors, weight = given
        return ops.mla_decode_project.triton(*tensors, scale, weight, None, 24, None, False, True)[0]

    (found,) = counted(query, q_latent[..., :8].contiguous(), q_rope, cos, sin, weight, weights=(4,))
    assert (found.kind, found.kernels, found.weight_bytes) == ("matmul", 1, 2 * 8 * 16 * F4)
    # nope and rotary parts, cos and sin; the latter rotated, and the former as wide as the latent
    assert found.activation_bytes == (2 * 8 + 2 * 8 + 8 + 2 * 8 + 2 * 16) * F4
    # of many tokens, whose numbers are more than the weight's
    many = torch.randn(64, 2, 8), torch.randn(64, 2, 8), torch.ones(64, 4), torch.zeros(64, 4)
    (found,) = counted(query, *many, weight, weights=(4,))
    assert found.weight_bytes == 2 * 8 * 16 * F4
    assert found.activation_bytes == 64 * (2 * 8 + 2 * 8 + 8 + 2 * 8 + 2 * 16) * F4
    (found,) = counted(attend, q_latent, q_rope, cache, table, seqlens, weight, weights=(5,))
    # of a product's operands weights are not counted, here as little as where it is a product alone
    assert (found.kind, found.kernels, found.weight_bytes) == ("attention", 2, 0)
    # two pages, the query, and the values
    assert found.activation_bytes == (2 * 64 * 24 + 2 * 16 + 2 * 8 + 2 * 24) * F4


def test_of_experts_those_with_rows_are_read() -> None:
    """Four matrices, two rows: two of them are weights that are read, whatever the format; rows and results are the rest."""
    ops: Any = torch.ops.deepfuse
    offsets = torch.tensor([1, 1, 2, 2], dtype=torch.int32)
    x, weight = torch.randn(2, 128).bfloat16(), torch.randn(4, 256, 128).bfloat16()
    (found,) = counted(ops.grouped_matmul.reference, x, weight, offsets, weights=(1,))
    assert (found.kind, found.weight_bytes) == ("matmul", 2 * 256 * 128 * 2)
    assert found.activation_bytes == 2 * (128 + 256) * 2
    in_fp8 = x.to(torch.float8_e4m3fn), torch.ones(2, 1), weight.to(torch.float8_e4m3fn), torch.ones(4, 2, 1)
    multiply = ops.fp8_grouped_matmul.reference
    (found,) = counted(lambda *given: multiply(*given, torch.bfloat16), *in_fp8, offsets, weights=(2, 3))
    assert (found.kind, found.weight_bytes) == ("matmul", 2 * (256 * 128 + 2 * F4))
    assert found.activation_bytes == 2 * (128 + F4 + 256 * 2)


def test_what_is_made_of_weights_is_no_activation() -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        return x @ (w * 2)

    found = counted(fn, X, W, weights=(1,))
    assert [(launch.kind, launch.activation_bytes, launch.weight_bytes) for launch in found] == [
        ("region", 0, 2 * 16 * 16 * F4),
        ("matmul", 2 * N, 16 * 16 * F4),
    ]
    # rows of an embedding are weights, and what they become is not
    found = counted(lambda w, i: w[i] + 0.0 * i[:, None], W, torch.arange(3), weights=(0,))
    assert [(launch.activation_bytes, launch.weight_bytes) for launch in found] == [(3 * 8 + 3 * 16 * F4, 3 * 16 * F4)]


def test_views_and_memory_that_nobody_filled_cost_nothing() -> None:
    assert regions(lambda x: x.view(16, 8).t()[2:], X) == []
    assert regions(lambda x: torch.empty_like(x), X) == []


def test_sorting_is_a_call() -> None:
    found = counted(lambda x: (x + 1).topk(2), X)
    assert [(launch.kind, launch.name) for launch in found] == [("region", "add"), ("kernel", "topk")]


# ops of the dialect


def lowered(fn: Callable[..., Any], *args: Tensor, device: str = "cuda") -> fx.Graph:
    with FakeTensorMode():
        fakes = [torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device=device) for a in args]
        graph = make_fx(fn)(*fakes).graph
        lower(graph, providers={})
        graph.eliminate_dead_code()
    return graph


def test_a_kernel_moves_what_the_op_says_it_costs() -> None:
    x = torch.randn(4, 256)
    graph = lowered(lambda x: quantize(x, torch.float8_e4m3fn, 1, 128, False), x)
    (launch,) = launches(graph, [])
    assert (launch.kind, launch.name, launch.kernels) == ("kernel", "quantize.triton", 1)
    assert launch.activation_bytes == x.numel() * (4 + 1) + 4 * 2 * 4


def test_a_kernel_counts_as_often_as_it_launches() -> None:
    graph = lowered(lambda x: quantize(x, torch.float8_e4m3fn, 0, 0, False), torch.randn(4, 256))
    (launch,) = launches(graph, [])
    # zeros to begin from, the largest of all, and the quotients
    assert launch.kernels == 3


def test_a_cache_that_is_written_counts_by_what_is_written() -> None:
    seen: dict[str, list[Launch]] = {}

    def look(gm: fx.GraphModule, _: Any) -> Any:
        for provider in ("triton", "reference"):
            graph = fx.GraphModule(gm, copied(gm.graph).graph).graph
            lower(graph, providers={"append_latent": provider})
            graph.eliminate_dead_code()
            seen[provider] = launches(graph, [])
        return gm

    def fn(cache: Tensor, latent: Tensor, rope: Tensor, slots: Tensor) -> Tensor:
        append_latent(cache, latent, rope, slots)
        return latent + 1

    with FakeTensorMode(), torch.no_grad():
        fakes = [torch.empty(shape, device="cuda") for shape in ((9, 64, 24), (3, 16), (3, 8))]
        compiled = aot_function(fn, fw_compiler=look, inference_compiler=look, keep_inference_input_mutations=True)
        compiled(*fakes, torch.zeros(3, dtype=torch.int64, device="cuda"))
    written = 2 * 3 * 24 * F4 + 3 * 8
    added = 2 * 3 * 16 * F4
    assert {launch.name: launch.activation_bytes for launch in seen["triton"]} == {
        "append_latent.triton": written,
        "add": added,
    }
    assert {launch.name: launch.activation_bytes for launch in seen["reference"]} == {
        "index_put": written,
        "add": added,
    }


# every graph


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 99), st.integers(0, 99)), min_size=1, max_size=14))
def test_regions_can_run_one_after_the_other(steps: list[tuple[int, int, int]]) -> None:
    """Every stored loop stands in one region, and no two launches wait for each other."""

    def fn(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        made, results = [x], []
        for what, first, second in steps:
            a, b = made[first % len(made)], made[second % len(made)]
            if what == 0:
                made.append(a + b)
            elif what == 1:
                made.append(a / a.amax(-1, keepdim=True))
            elif what == 2:
                made.append(b - a.sum(0))
            elif what == 3:
                made.append(a @ w)
            else:
                results.append(a * 2)
        return (*results, made[-1])

    graph = trace(fn, torch.randn(4, 4), torch.randn(4, 4)).graph
    graph.eliminate_dead_code()
    found = launches(graph, [])
    owner = {node: i for i, launch in enumerate(found) for node in launch.nodes}
    assert len(owner) == sum(len(launch.nodes) for launch in found)
    waits: dict[int, set[int]] = {i: set() for i in range(len(found))}
    for i, launch in enumerate(found):
        pending, seen = list(launch.nodes), set()
        while pending:
            for before in pending.pop().all_input_nodes:
                if owner.get(before, i) != i:
                    waits[i].add(owner[before])
                elif before not in seen:
                    seen.add(before)
                    pending.append(before)
    ready: set[int] = set()
    while len(ready) < len(found):
        now = {i for i in waits if i not in ready and waits[i] <= ready}
        assert now, "regions wait for each other"
        ready |= now
    # and in the order they are given in
    assert all(before < i for i, some in waits.items() for before in some)
    results = [node for node in next(n for n in graph.nodes if n.op == "output").args[0] if node.op != "placeholder"]
    assert all(node in owner for node in results)

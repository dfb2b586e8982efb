"""A printed graph runs, and gives the same values bitwise."""

import operator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from deepfuse.ir.printer import graph_text, run_text, source_line, where
from deepfuse.ops.add_rms_norm import add_rms_norm
from deepfuse.ops.expert_permute import expert_permute
from deepfuse.ops.rms_norm import rms_norm
from deepfuse.ops.route import route
from deepfuse.ops.swiglu import swiglu
from graphs import trace


def assert_same_values(module: fx.GraphModule, *args: Any) -> str:
    text = graph_text(module.graph)
    got, want = (torch.utils._pytree.tree_leaves(f(*args)) for f in (run_text(text), module))
    assert len(got) == len(want) > 0
    for g, w in zip(got, want, strict=True):
        assert type(g) is type(w)
        if isinstance(g, Tensor):
            assert g.dtype == w.dtype
            torch.testing.assert_close(g, w, atol=0, rtol=0, equal_nan=True)
        else:
            assert g == w
    return text


def layer(x: Tensor, weight: Tensor, logits: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    y, h = add_rms_norm(x, x * 0.1, weight, 1e-6)
    weights, experts = route(logits, bias, "sigmoid", "top2_sum", 2, 1, 2, True, 2.5, 0)
    rows, order, inverse, offsets = expert_permute(y, experts, 4)
    return rms_norm(swiglu(y, h), weight, 1e-6), weights, rows, order, inverse, offsets


LAYER = torch.randn(5, 8), torch.randn(8), torch.randn(5, 4), torch.randn(4)


def test_ops_of_the_dialect() -> None:
    text = assert_same_values(trace(layer, *LAYER), *LAYER)
    assert "# float32[5, 8]" in text
    assert "torch.ops.deepfuse.route.default(" in text and "'sigmoid', 'top2_sum'" in text
    # several outputs
    assert "(float32[5, 2], int64[5, 2])" in text


def test_symbolic_shapes() -> None:
    module = make_fx(layer, tracing_mode="symbolic")(*LAYER)
    assert "[s" in assert_same_values(module, *LAYER)
    assert_same_values(module, torch.randn(9, 8), torch.randn(8), torch.randn(9, 4), torch.randn(4))


def lists(x: Tensor) -> list[Any]:
    a, b = x.split([2, 3], dim=1)
    c = torch.cat([b, a, a], dim=-1)
    return [c.permute(1, 0).reshape([-1, 2]), (c.amax(), a[:, None].expand(-1, 4, -1))]


def dtypes(x: Tensor) -> tuple[Tensor, ...]:
    narrow = x.to(torch.bfloat16)
    zeros = torch.zeros(3, dtype=torch.int32, device=x.device)
    full = torch.full((2, 2), float("-inf"), dtype=torch.float64)
    return narrow, zeros, full, torch.where(x > 0, float("inf"), x), x.new_full((2,), float("nan")), x.bool()


@pytest.mark.parametrize("fn", [lists, dtypes])
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_arguments_of_all_kinds(fn: Any, mode: str) -> None:
    x = torch.randn(4, 5)
    assert_same_values(make_fx(fn, tracing_mode=mode)(x), x)


def test_functions_of_python() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    size = graph.call_function(torch.ops.aten.sym_size.int, (x, 0))
    half = graph.call_function(operator.floordiv, (size, 2))
    most = graph.call_function(max, (half, 1))
    first = graph.call_function(operator.getitem, (x, slice(None, most, None)))
    kept = graph.call_function(torch.ops.aten.sum.dim_IntList, (first, [0]), {"keepdim": True, "dtype": torch.float64})
    graph.output((kept, (half,), [most], None, True, 0.1, "text"))
    assert_same_values(fx.GraphModule(nn.Module(), graph), torch.randn(6, 2))


def test_a_call_that_gives_nothing() -> None:
    def write(x: Tensor) -> Tensor:
        x.add_(1)
        torch._check(x.shape[0] > 1)
        return x

    module = trace(write, torch.zeros(3))
    assert torch.equal(run_text(graph_text(module.graph))(torch.zeros(3)), torch.ones(3))


def test_attributes_are_refused() -> None:
    module = make_fx(lambda x: x + torch.tensor([1.0, 2.0]))(torch.ones(2))
    assert module.graph.find_nodes(op="get_attr")
    with pytest.raises(ValueError, match="graph_text: want a graph without attributes, got .*; lift it to an input"):
        graph_text(module.graph)


# where


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2, bias=False) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for each in self.layers:
            x = each(x)
        return x + 1


def test_a_node_is_where_its_module_is() -> None:
    seen: list[fx.GraphModule] = []

    def backend(module: fx.GraphModule, _: Any) -> Any:
        seen.append(module)
        return module

    model = Block()
    torch.compile(lambda x: model(x), backend=backend)(torch.ones(1, 2))
    calls = [node for node in seen[0].graph.nodes if node.op == "call_function"]
    paths = [where(node) for node in calls]
    assert [p.removeprefix("model.") for p in paths[:2]] == ["layers.0", "layers.1"]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("L['model'].model.layers.slice(None, 2, None)[1]._modules['self_attn']", "self_attn"),
        ("L['self'].layers[3].mlp", "layers.3.mlp"),
        ("", "here"),
    ],
)
def test_a_path_is_read_from_an_access(path: str, name: str) -> None:
    node = fx.Graph().placeholder("here")
    node.meta["nn_module_stack"] = {"a": ("L['other']", nn.Module), "b": (path, nn.Module)} if path else {}
    assert where(node).endswith(name)


def test_a_line_says_where_it_comes_from() -> None:
    module = trace(lambda x: x * 2, torch.ones(3))
    node = module.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)[0]
    node.meta["nn_module_stack"] = {"a": ("L['self'].layers[3].mlp", nn.Module)}
    assert "# float32[3]  layers.3.mlp" in assert_same_values(module, torch.ones(3))


def test_the_line_of_a_call_of_ours_is_the_callers() -> None:
    lines: list[str] = []

    def look(gm: fx.GraphModule, inputs: list[Tensor]) -> Any:
        lines.extend(source_line(node) for node in gm.graph.nodes if node.op == "call_function")
        return gm.forward

    torch.compile(lambda x, weight: rms_norm(x, weight, 1e-6), backend=look)(torch.randn(2, 4), torch.randn(4))
    code = test_the_line_of_a_call_of_ours_is_the_callers.__code__
    assert lines == [f"test_printer.py:{code.co_firstlineno + 7}"]

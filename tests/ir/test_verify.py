"""Each rule of the dialect, broken once."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from deepfuse.ir.op import OPS
from deepfuse.ir.verify import GraphError, verify
from deepfuse.ops.add_rms_norm import add_rms_norm
from deepfuse.ops.append_latent import append_latent
from deepfuse.ops.rms_norm import rms_norm
from deepfuse.ops.swiglu import swiglu
from graphs import trace

X, WEIGHT = torch.randn(3, 8), torch.ones(8)
RMS_NORM, ADD = torch.ops.deepfuse.rms_norm.default, torch.ops.aten.add.Tensor


def block(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    y, h = add_rms_norm(x, x + 1, weight, 1e-6)
    return rms_norm(swiglu(y, h), weight, 1e-6), h


@pytest.fixture
def graph() -> fx.Graph:
    return trace(block, X, WEIGHT).graph


def call(graph: fx.Graph, target: Any) -> fx.Node:
    return next(node for node in graph.nodes if node.target == target)


def complaint(graph: fx.Graph) -> str:
    """What is said against a graph; nothing where it keeps the rules."""
    try:
        verify(graph)
    except GraphError as error:
        return str(error)
    return ""


def test_a_traced_graph_keeps_all_rules(graph: fx.Graph) -> None:
    assert complaint(graph) == ""
    del call(graph, RMS_NORM).meta["val"]
    assert complaint(graph) != ""


def test_calls_that_give_nothing_have_no_value() -> None:
    def write(cache: Tensor, latent: Tensor, rope: Tensor, slots: Tensor) -> Tensor:
        append_latent(cache, latent, rope, slots)
        return cache

    cache, slots = torch.zeros(2, 64, 6), torch.tensor([64, 65, 66])
    graph = trace(write, cache, torch.ones(3, 4), torch.ones(3, 2), slots).graph
    node = call(graph, torch.ops.deepfuse.append_latent.default)
    node.meta.pop("val", None)
    assert complaint(graph) == "" and not node.users


def test_sizes_may_be_symbols() -> None:
    graph = make_fx(block, tracing_mode="symbolic")(X, WEIGHT).graph
    assert any(not isinstance(s, int) for s in call(graph, RMS_NORM).meta["val"].shape)
    assert complaint(graph) == ""


def test_a_node_before_its_argument(graph: fx.Graph) -> None:
    first = call(graph, ADD)
    next(iter(first.users)).append(first)
    with pytest.raises(GraphError, match="want a well-formed graph, got .*add"):
        verify(graph)


def test_attributes() -> None:
    module = make_fx(lambda x: x + torch.arange(8.0))(X)
    module.register_buffer("bias", torch.ones(8))
    node = next(iter(module.graph.find_nodes(op="placeholder")))
    with module.graph.inserting_after(node):
        module.graph.get_attr("bias")
    with pytest.raises(GraphError, match="want placeholders and calls only, got get_attr bias"):
        verify(module.graph)


def test_methods(graph: fx.Graph) -> None:
    with graph.inserting_before(graph.output_node()):
        graph.call_method("exp", (call(graph, ADD),))
    with pytest.raises(GraphError, match="want placeholders and calls only, got call_method exp"):
        verify(graph)


def test_values_are_known(graph: fx.Graph) -> None:
    node = call(graph, ADD)
    del node.meta["val"]
    with pytest.raises(GraphError, match=rf"want meta\['val'\] on every call, got none on {node.name} \(aten.add"):
        verify(graph)


def test_dialect_ops_are_those_of_the_table(graph: fx.Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(OPS, "swiglu")
    with pytest.raises(GraphError, match="want an op of the table, got deepfuse.swiglu.default at swiglu"):
        verify(graph)


def test_arguments_are_those_of_the_schema(graph: fx.Graph) -> None:
    node = call(graph, RMS_NORM)
    x, weight, eps = node.args
    node.args, node.kwargs = (x, weight), {"eps": eps}
    with pytest.raises(
        GraphError, match=r"want 3 positional arguments of deepfuse::rms_norm\(.*, got 2 and \['eps'\] at rms_norm"
    ):
        verify(graph)


def wider(value: Tensor) -> Tensor:
    return value.new_empty(3, 9)


def narrower(value: Tensor) -> Tensor:
    return value.to(torch.float16)


def flatter(value: Tensor) -> Tensor:
    return value.new_empty(24)


@pytest.mark.parametrize("change", [wider, narrower, flatter])
def test_values_are_those_of_the_shape_rule(graph: fx.Graph, change: Callable[[Tensor], Tensor]) -> None:
    node = call(graph, RMS_NORM)
    node.meta["val"] = change(node.meta["val"])
    with pytest.raises(
        GraphError,
        match=r"want \[\(\[3, 8\], torch.float32\)\] from the shape rule of deepfuse.rms_norm.default, got .* of rms_norm",
    ):
        verify(graph)


def test_every_output_has_a_value(graph: fx.Graph) -> None:
    node = call(graph, torch.ops.deepfuse.add_rms_norm.default)
    node.meta["val"] = node.meta["val"][:1]
    with pytest.raises(
        GraphError, match="from the shape rule of deepfuse.add_rms_norm.default, got .* of add_rms_norm"
    ):
        verify(graph)


def test_an_op_refuses_its_arguments(graph: fx.Graph) -> None:
    node = call(graph, RMS_NORM)
    node.args = (node.args[0], call(graph, ADD), node.args[2])
    with pytest.raises(ValueError, match="rms_norm"):
        verify(graph)


def test_calls_that_did_not_change_are_not_asked_again(graph: fx.Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    known: dict = {}
    verify(graph, known)
    asked = []
    for name in ("rms_norm", "add_rms_norm", "swiglu"):
        op = OPS[name]
        fake = lambda *args, op=op: asked.append(op.name) or op.fake(*args)
        monkeypatch.setitem(OPS, name, dataclasses.replace(op, fake=fake))
    verify(graph, known)
    assert asked == []
    # another value of an input is a change of all that read it, though their arguments are the same nodes
    swiglu_call = call(graph, torch.ops.deepfuse.swiglu.default)
    swiglu_call.meta["val"] = swiglu_call.meta["val"].clone()
    verify(graph, known)
    assert asked == ["swiglu", "rms_norm"]
    call(graph, RMS_NORM).meta["val"] = X.bfloat16()
    with pytest.raises(GraphError, match=r"got .*bfloat16"):
        verify(graph, known)
    call(graph, RMS_NORM).args = (call(graph, RMS_NORM).args[0], 5)
    with pytest.raises(GraphError, match="want 3 positional arguments"):
        verify(graph, known)

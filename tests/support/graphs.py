"""Trace a function to a graph, and compare graphs by what they compute rather than by the names in them."""

from collections.abc import Callable
from operator import attrgetter
from typing import Any

from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from deepfuse.passes.journal import noting


def trace(fn: Callable[..., Any], *args: Any) -> fx.GraphModule:
    """The graph of ATen and deepfuse ops that ``fn(*args)`` runs, with ``meta["val"]`` on every node."""
    return make_fx(fn, tracing_mode="fake")(*args)


def rewritten(rule: Callable[..., int], fn: Callable[..., Any], *args: Any) -> tuple[fx.GraphModule, int, list[str]]:
    """The graph of ``fn(*args)`` after a pass, well formed and without dead nodes; the pass's count; what it noted."""
    gm = trace(fn, *args)
    notes: list[str] = []
    with noting(notes):
        count = rule(gm.graph)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    return gm, count, notes


def structure(gm: fx.GraphModule) -> list[str]:
    """One line a node, in order; a node is named by its position, and dead nodes are left out."""
    live = _live_nodes(gm.graph)
    position = {node: f"%{i}" for i, node in enumerate(live)}

    def show(arguments: Any) -> str:
        return str(fx.map_arg(arguments, position.__getitem__))

    return [f"{position[n]} = {_action(gm, n)} {show(n.args)} {show(dict(sorted(n.kwargs.items())))}" for n in live]


def assert_same_graph(actual: fx.GraphModule, expected: fx.GraphModule) -> None:
    """The graphs are equal in :func:`structure`, and ``actual`` is well formed."""
    actual.graph.lint()
    assert structure(actual) == structure(expected)


def _live_nodes(graph: fx.Graph) -> list[fx.Node]:
    """Nodes whose value or effect is used. ``graph`` itself is left as it is."""
    live: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op in ("placeholder", "output") or node.is_impure() or any(user in live for user in node.users):
            live.add(node)
    return [node for node in graph.nodes if node in live]


def _action(gm: fx.GraphModule, node: fx.Node) -> str:
    """What a node does, free of the names a tracer makes up (arguments, constants)."""
    if node.op == "call_function":
        return str(node.target)
    if node.op == "get_attr":
        value = attrgetter(str(node.target))(gm)
        # in full: str() of a large tensor leaves out its middle
        return f"get_attr {value.dtype} {value.tolist()}" if isinstance(value, Tensor) else f"get_attr {value}"
    return node.op if node.op in ("placeholder", "output") else f"{node.op} {node.target}"

"""Undo what a pass did to a graph, whatever state it left it in."""

import copy
from collections.abc import Callable

from torch import fx


def snapshot(graph: fx.Graph) -> Callable[[], None]:
    """Remember a graph; the function returned puts it back, in place.

    Inputs stay the nodes they are: Inductor and the partitioner know them. Calls become new nodes.
    """
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    metas = [copy.copy(node.meta) for node in inputs]
    calls = [
        (node, node.op, node.target, node.args, node.kwargs, copy.copy(node.meta))
        for node in graph.nodes
        if node.op not in ("placeholder", "output")
    ]
    output = graph.output_node()
    result = output.args

    def restore() -> None:
        if [node for node in graph.nodes if node.op == "placeholder"] != inputs or graph.output_node() is not output:
            raise RuntimeError("rollback: want a pass that leaves the graph's inputs and output node, got other ones")
        broken = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
        for node in [output, *broken]:
            node.args, node.kwargs = (), {}  # whatever refers to whatever: now nothing does
        for node in broken:
            graph.erase_node(node)
        new: dict[fx.Node, fx.Node] = {node: node for node in inputs}
        for node, meta in zip(inputs, metas, strict=True):
            node.meta = meta
        with graph.inserting_before(output):
            for old, op, target, args, kwargs, meta in calls:
                args, kwargs = fx.map_arg((args, kwargs), lambda node: new[node])
                new[old] = graph.create_node(op, target, args, kwargs)
                new[old].meta = meta
                new[old].name = old.name  # which is free, though the graph gives no name twice
        output.args = fx.map_arg(result, lambda node: new[node])

    return restore

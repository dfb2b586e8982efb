"""The rules of the dialect, checked on a graph.

1. the graph is well formed (``fx.Graph.lint``) and has no attributes: parameters are inputs
2. every call has its value in ``meta["val"]``: a later pass decides by shapes and dtypes
3. a call of a dialect op has the arguments of its schema, and its shape rule gives what ``meta["val"]`` says
"""

import contextlib
from typing import Any

import torch
from torch import Tensor, fx

from deepfuse.ir.op import NAMESPACE, OPS


class GraphError(ValueError):
    """A graph breaks a rule of the dialect."""


Known = dict[fx.Node, tuple[Any, ...]]
"""Calls that were found right: what they call, their arguments, their value and those of their inputs."""


def verify(graph: fx.Graph, known: Known | None = None) -> None:
    """Check all rules.

    Args:
        known: of the calls checked before, in this graph; it is filled. What has not changed since is not asked again:
            shape rules take most of the time.

    Raises:
        GraphError: names the node, the rule and what was found.
    """
    try:
        graph.lint()
    except RuntimeError as error:
        raise GraphError(f"verify: want a well-formed graph, got {error}") from error
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module", "call_method"):
            raise GraphError(f"verify: want placeholders and calls only, got {node.op} {node.target}")
        if node.op != "call_function":
            continue
        state = (node.target, node.args, node.kwargs, *(n.meta.get("val") for n in (node, *node.all_input_nodes)))
        before = () if known is None else known.get(node, ())
        # the same objects: symbolic sizes must not be compared, and values are not changed in place
        if len(before) == len(state) and all(a is b for a, b in zip(before, state, strict=True)):
            continue
        _verify_call(node)
        if known is not None:
            known[node] = state


def verify_types(graph: fx.Graph) -> None:
    """Check that every op, of whatever dialect, gives what ``meta["val"]`` says, by running it on fake tensors.

    Raises:
        GraphError: names the node.
    """
    for node in graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        arguments, named = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        leaves = torch.utils._pytree.tree_leaves((arguments, named, node.meta.get("val")))
        if any(isinstance(leaf, torch.SymInt | torch.SymFloat | torch.SymBool) for leaf in leaves):
            continue  # an op on a size that is known later may ask for it
        mode = next((leaf.fake_mode for leaf in leaves if hasattr(leaf, "fake_mode")), None)
        shapes = [size for leaf in leaves if isinstance(leaf, Tensor) for size in leaf.shape]
        if mode is None or not all(isinstance(size, int) for size in shapes):
            continue
        with mode:
            _verify_value(node, node.target(*arguments, **named))


def _verify_call(node: fx.Node) -> None:
    if "val" not in node.meta and not _gives_nothing(node):
        raise GraphError(f"verify: want meta['val'] on every call, got none on {node.name} ({node.target})")
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != NAMESPACE:
        return
    op = OPS.get(target._opname)
    if op is None:
        raise GraphError(f"verify: want an op of the table, got {target} at {node.name}")
    wanted = len(target._schema.arguments)
    if len(node.args) != wanted or node.kwargs:
        raise GraphError(
            f"verify: want {wanted} positional arguments of {op.schema}, got {len(node.args)} and "
            f"{sorted(node.kwargs)} at {node.name}"
        )
    values = fx.map_arg(list(node.args), lambda n: n.meta["val"])
    # symbolic sizes live in the mode they were traced in, and sizes of a real model must not be allocated
    modes = (getattr(v, "fake_mode", None) for v in torch.utils._pytree.tree_leaves(values))
    with next((mode for mode in modes if mode is not None), contextlib.nullcontext()):
        expected = op.fake(*values)
    _verify_value(node, expected)


def _gives_nothing(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and not node.target._schema.returns


def _verify_value(node: fx.Node, expected: Any) -> None:
    leaves = torch.utils._pytree.tree_leaves
    got = [v for v in leaves(node.meta.get("val")) if isinstance(v, Tensor)]
    want = [v for v in leaves(expected) if isinstance(v, Tensor)]
    same = len(got) == len(want) and all(
        g.dtype == w.dtype and g.ndim == w.ndim for g, w in zip(got, want, strict=True)
    )
    # symbolic sizes are compared as expressions: asking whether they are equal would add a guard
    sizes = [
        (g, w)
        for a, b in zip(got, want, strict=False)
        for g, w in zip(a.shape, b.shape, strict=False)
        if isinstance(g, int) and isinstance(w, int)
    ]
    if not same or any(g != w for g, w in sizes):
        raise GraphError(
            f"verify: want {[(list(w.shape), w.dtype) for w in want]} from the shape rule of {node.target}, got "
            f"{[(list(g.shape), g.dtype) for g in got]} in meta['val'] of {node.name}"
        )

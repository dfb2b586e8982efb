"""Put a traced PyTorch function in the place of a node."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from deepfuse.ir.private import inductor_decompositions

PROVENANCE = ("nn_module_stack", "stack_trace", "source_fn_stack", "custom", "original_aten", "seq_nr", "fwd_nn_module_stack")
"""Entries of ``node.meta`` that say where a node comes from; a new node inherits them from the one it replaces."""


def values(args: Any) -> Any:
    """The fake tensors (and plain values) that the arguments of a node stand for."""
    return fx.map_arg(args, lambda node: node.meta["val"])


def inherit(new: fx.Node, old: fx.Node) -> None:
    for key in PROVENANCE:
        if key in old.meta:
            new.meta[key] = old.meta[key]


def call(graph: fx.Graph, like: fx.Node, target: Callable[..., Any], *args: Any) -> fx.Node:
    """A new call of ``target`` at the graph's insertion point, with its value computed on fake tensors."""
    node = graph.call_function(target, args)
    fake_mode = fake_mode_of(graph)
    with fake_mode:
        node.meta["val"] = target(*values(args))
    inherit(node, like)
    return node


def fake_mode_of(graph: fx.Graph) -> Any:
    for node in graph.nodes:
        for value in torch.utils._pytree.tree_leaves(node.meta.get("val")):
            mode = getattr(value, "fake_mode", None)
            if mode is not None:
                return mode
    raise ValueError("passes: want a graph whose nodes carry fake tensors in meta['val'], got none")


def splice(node: fx.Node, fn: Callable[..., Any], args: Sequence[Any]) -> Any:
    """Trace ``fn`` on the values of ``args`` and insert its nodes before ``node``.

    Inductor's decompositions are applied, as they were to the rest of the graph.

    Returns:
        The node (or tuple of nodes) that ``fn`` returned.
    """
    graph = node.graph
    tensors = [a for a in args if isinstance(a, fx.Node) and isinstance(a.meta["val"], Tensor)]
    slots = {a: i for i, a in enumerate(dict.fromkeys(tensors))}
    scalars = values(list(args))

    def on_tensors(*given: Tensor) -> Any:
        full = [given[slots[a]] if isinstance(a, fx.Node) and a in slots else s for a, s in zip(args, scalars, strict=True)]
        return fn(*full)

    with fake_mode_of(graph):
        traced = make_fx(on_tensors, decomposition_table=inductor_decompositions())(*values(list(slots)))
    env = dict(zip((n for n in traced.graph.nodes if n.op == "placeholder"), slots, strict=True))
    result: Any = None
    with graph.inserting_before(node):
        for inner in traced.graph.nodes:
            if inner.op == "placeholder":
                continue
            if inner.op == "output":
                result = fx.map_arg(inner.args[0], lambda n: env[n])
                continue
            if inner.op == "get_attr":
                raise ValueError(f"{fn.__name__}: want a function without tensor constants, got {inner.target}")
            env[inner] = graph.node_copy(inner, lambda n: env[n])
            inherit(env[inner], node)
    return result


def replace_outputs(node: fx.Node, new: Any) -> None:
    """Let the users of ``node`` use ``new`` (a node, or one for each output) and erase it."""
    if isinstance(new, fx.Node):
        node.replace_all_uses_with(new)
    else:
        for user in list(node.users):
            assert user.target is operator.getitem, user
            user.replace_all_uses_with(new[user.args[1]])
            node.graph.erase_node(user)
    node.graph.erase_node(node)

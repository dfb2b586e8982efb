"""Put a traced PyTorch function in the place of a node."""

import operator
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from deepfuse.passes.trace import trace

PROVENANCE = (
    "nn_module_stack",
    "stack_trace",
    "source_fn_stack",
    "custom",
    "original_aten",
    "seq_nr",
    "fwd_nn_module_stack",
    "deepfuse_call",
)
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


def erase_dead(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """Erase those that nobody reads, and say which; what is left of a site must not be found again."""
    gone = []
    for node in sorted(nodes, reverse=True):
        if not node.users:
            node.graph.erase_node(node)
            gone.append(node)
    return gone


def fake_mode_of(graph: fx.Graph) -> Any:
    for node in graph.nodes:
        for value in torch.utils._pytree.tree_leaves(node.meta.get("val")):
            mode = getattr(value, "fake_mode", None)
            if mode is not None:
                return mode
    raise ValueError("passes: want a graph whose nodes carry fake tensors in meta['val'], got none")


class Splicer:
    """Traces functions and inserts their nodes; equal calls are traced once, and equal nodes inserted once.

    Calls must come in the order of the graph, which is functional: an equal node before is as good as a new one.
    """

    def __init__(self, graph: fx.Graph, *, share: bool = True):
        """``share``: whether equal nodes are inserted once; else calls may come in any order."""
        self.graph, self.share = graph, share
        self._fake_mode = fake_mode_of(graph)
        self._traced: dict[tuple[Any, ...], fx.Graph] = {}
        self._inserted: dict[tuple[Any, str], fx.Node] = {}

    def splice(self, node: fx.Node, fn: Callable[..., Any], args: Sequence[Any], like: fx.Node | None = None) -> Any:
        """Insert the nodes of ``fn`` for these arguments before ``node``.

        Inductor's decompositions are applied, as they were to the rest of the graph. New nodes say that they come from
        where ``like`` comes from; ``None``: from where ``node`` does.

        Returns:
            The node (or tuple of nodes) that ``fn`` returned.
        """
        tensors = [a for a in args if isinstance(a, fx.Node) and isinstance(a.meta["val"], Tensor)]
        distinct = list(dict.fromkeys(tensors))
        scalars = [None if a in tensors else v for a, v in zip(args, values(list(args)), strict=True)]
        places = [distinct.index(a) if a in tensors else None for a in args]
        key = (fn, str(places), str(scalars), *(_signature(n.meta["val"]) for n in distinct))
        if key not in self._traced:
            self._traced[key] = self._trace(fn, places, scalars, values(distinct))
        return self._insert(self._traced[key], node, distinct, like or node)

    def _trace(
        self, fn: Callable[..., Any], places: list[int | None], scalars: list[Any], given: list[Tensor]
    ) -> fx.Graph:
        def on_tensors(*tensors: Tensor) -> Any:
            return fn(*(s if p is None else tensors[p] for p, s in zip(places, scalars, strict=True)))

        return trace(on_tensors, given, self._fake_mode)

    def _insert(self, traced: fx.Graph, node: fx.Node, inputs: list[fx.Node], like: fx.Node) -> Any:
        env = dict(zip((n for n in traced.nodes if n.op == "placeholder"), inputs, strict=True))
        result: Any = None
        with self.graph.inserting_before(node), self._fake_mode:
            for inner in traced.nodes:
                if inner.op == "output":
                    result = fx.map_arg(inner.args[0], lambda n: env[n])
                elif _takes_all(inner):
                    # torch 2.11's Inductor cannot tell that a slice of a free size takes all of it
                    env[inner] = env[inner.args[0]]
                elif inner.op != "placeholder":
                    args, kwargs = fx.map_arg((inner.args, inner.kwargs), lambda n: env[n])
                    key = (inner.target, f"{args} {kwargs}")
                    if self.share and key in self._inserted:
                        env[inner] = self._inserted[key]
                        continue
                    new = env[inner] = self._inserted[key] = self.graph.node_copy(inner, lambda n: env[n])
                    # a value of its own: Inductor reads from its storage which nodes are views of which
                    target: Any = new.target
                    new.meta = {"val": target(*values(new.args), **values(new.kwargs))}
                    inherit(new, like)
        return result


def _takes_all(node: fx.Node) -> bool:
    """Whether a node is a slice from the beginning to the end, as indexing writes for ``x[:, :k]``."""
    if node.target is not torch.ops.aten.slice.Tensor or node.kwargs:
        return False
    given: dict[str, Any] = dict(zip(("x", "dim", "start", "end", "step"), node.args, strict=False))
    return given.get("start", 0) in (0, None) and given.get("end") in (None, sys.maxsize) and given.get("step", 1) == 1


def _signature(value: Tensor) -> str:
    return f"{tuple(value.shape)} {value.stride()} {value.dtype} {value.device}"


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

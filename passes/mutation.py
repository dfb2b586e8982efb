"""Ops that mutate, as they stand in a functional graph: ``auto_functionalized_v2`` nodes.

    new_cache = auto_functionalized_v2(append_latent, latent=..., k_rope=..., slots=..., _cache_base_index=0,
                                       _all_bases=[cache])[1]

The node gives what the op returns (``None`` for nothing), and then a new tensor for each that it changes. An argument
that is changed is named by its place among ``_all_bases``; a view of another tensor carries further ``_NAME_...``
entries, which say how it is one.
"""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from deepfuse.ir.op import Op
from deepfuse.passes.splice import call, fake_mode_of, inherit, values

AUTO_FUNCTIONALIZED = torch.ops.higher_order.auto_functionalized_v2


def is_mutation(node: fx.Node) -> bool:
    return node.target is AUTO_FUNCTIONALIZED


def is_of_a_view(node: fx.Node) -> bool:
    """Whether an argument that the op changes is a view of another tensor."""
    views = [name for name in node.kwargs if name.startswith("_") and not name.endswith("_base_index")]
    return views != ["_all_bases"]


def mutation_arguments(node: fx.Node) -> list[Any]:
    """The arguments of the op in the order of its schema; none is a view that the op changes."""
    overload: Any = node.args[0]
    kwargs: Any = node.kwargs
    names = [argument.name for argument in overload._schema.arguments]
    return [kwargs[name] if name in kwargs else kwargs["_all_bases"][kwargs[f"_{name}_base_index"]] for name in names]


def call_mutation(graph: fx.Graph, like: fx.Node, op: Op, args: Sequence[Any]) -> tuple[list[fx.Node], list[fx.Node]]:
    """A new call of an op that mutates at the graph's insertion point, as a function of what it changes.

    Returns:
        What the op returns, and what it changed, each with its value on fake tensors.
    """
    given: dict[str, Any] = {}
    bases: list[Any] = []
    for argument, value in zip(op.overload._schema.arguments, args, strict=True):
        if argument.is_write:
            given[f"_{argument.name}_base_index"] = len(bases)
            bases.append(value)
        else:
            given[argument.name] = value
    node = graph.call_function(AUTO_FUNCTIONALIZED, (op.overload,), {**given, "_all_bases": bases})
    inherit(node, like)
    with fake_mode_of(graph):
        returned = torch.utils._pytree.tree_leaves(op.fake(*values(list(args))))
        node.meta["val"] = (*(returned or [None]), *(base.meta["val"].clone() for base in bases))
    results = [call(graph, like, operator.getitem, node, i) for i in range(len(node.meta["val"]))]
    return results[: -len(bases)], results[-len(bases) :]

"""Weights that lie one behind the other in memory, read as one tensor through the input that begins there.

They are inputs of the graph; the runtime has laid them out (``runtime/weight_layout.py``), since putting them together
in a graph would copy them at every call.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from deepfuse.ir.private import storage_id
from deepfuse.passes.splice import call

aten = torch.ops.aten


def unreadable(weight: object) -> str | None:
    """``None`` for an input of the graph without gaps, or why it cannot be a part of something larger."""
    if not (isinstance(weight, fx.Node) and weight.op == "placeholder"):
        return "its weight is computed"
    return None if weight.meta["val"].is_contiguous() else "the rows of its weight lie apart"


def gap(before: Tensor, after: Tensor) -> str | None:
    """``None`` if a tensor's rows lie right behind those of another, or what lies between."""
    if before.dtype != after.dtype or before.shape[-1] != after.shape[-1]:
        return f"one is {before.dtype} {list(before.shape)}, the other {after.dtype} {list(after.shape)}"
    if storage_id(before) != storage_id(after):
        return "each has memory of its own"
    between = after.storage_offset() - before.storage_offset() - before.numel()
    return f"it begins {between} elements behind the first one's end" if between else None


def first_in_memory(weight: fx.Node) -> fx.Node | None:
    """The input that begins where the memory of this one does: Inductor counts from a tensor, eager from the memory."""
    value = weight.meta["val"]
    for node in weight.graph.find_nodes(op="placeholder"):
        other = node.meta.get("val")
        same = isinstance(other, Tensor) and other.dtype == value.dtype and storage_id(other) == storage_id(value)
        if same and not other.storage_offset():
            return node
    return None


def as_one(graph: fx.Graph, like: fx.Node, first: fx.Node, shape: Sequence[int]) -> fx.Node:
    """The tensor of this shape that begins with ``first``; :func:`first_in_memory` must have something to give."""
    base, strides = first_in_memory(first), [1]
    assert base is not None, first
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    offset = first.meta["val"].storage_offset()
    return call(graph, like, aten.as_strided.default, base, list(shape), strides, offset)

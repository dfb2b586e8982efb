"""Calls that give back their operand go.

    before:  y = x * 1.0;  z = view(y, y.shape);  i = j + 0
    after:   x, x, j

Why: they stand between nodes that other passes match, and some are copies.
Requires: result and operand of one shape, dtype and layout; the result is no output of the graph (which must not become
an input, or the same tensor as another output), nor seen by one through views, if it is a copy; and what is copied is no
input (which the graph may write to), nor a view of one.
Numerics: exact. A sum with 0 stays for floats (it turns -0.0 into 0.0), as does a product with 1 for integers and bools.
"""

from typing import Any

import torch
from torch import Tensor, fx

from deepfuse.ir.printer import where
from deepfuse.passes.fusion import fusion
from deepfuse.passes.journal import note
from deepfuse.passes.match import CAST, VIEWS, op_name

aten = torch.ops.aten
_RESHAPED = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.expand.default,
    aten.slice.Tensor,
    aten.permute.default,
    aten.alias.default,
    aten.detach.default,
    CAST,
}
"""No-ops where nothing changes in shape, dtype and layout."""


@fusion(stage="semantic", saves="a read and a write for each copy that went")
def eliminate_no_ops(graph: fx.Graph) -> int:
    """Rewrite in place; returns the number of calls that went."""
    gone = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor) or not node.args:
            continue
        operand = node.args[0]
        if not isinstance(operand, fx.Node) or not _gives_back(node, operand):
            continue
        if _is_output(node):
            note(f"{op_name(node.target)} at {where(node)}: stays: it is an output of the graph")
            continue
        note(f"{op_name(node.target)} at {where(node)}: gone")
        node.replace_all_uses_with(operand)
        graph.erase_node(node)
        gone += 1
    return gone


def _gives_back(node: fx.Node, operand: fx.Node) -> bool:
    result, given = node.meta["val"], operand.meta.get("val")
    if not isinstance(given, Tensor) or _layout(result) != _layout(given):
        return False
    if node.target is aten.permute.default:
        dims: Any = node.args[1]
        return [d % given.ndim for d in dims] == list(range(given.ndim))
    if node.target is aten.slice.Tensor:
        step = node.args[4] if len(node.args) > 4 else 1
        return isinstance(step, int) and step == 1
    if node.target in _RESHAPED:
        return True
    if node.target is aten.clone.default:
        return _memory_of(operand).op != "placeholder"
    other = node.args[1] if len(node.args) > 1 else None
    if not isinstance(other, int | float) or isinstance(other, bool):
        return False
    if node.target in (aten.mul.Tensor, aten.div.Tensor):
        return other == 1 and given.is_floating_point()
    return node.target in (aten.add.Tensor, aten.sub.Tensor) and other == 0 and not given.is_floating_point()


def _is_output(node: fx.Node) -> bool:
    """Whether the graph gives the result to its caller; of a copy, also in a view."""
    copies = node.target not in VIEWS
    return any(user.op == "output" or (copies and user.target in VIEWS and _is_seen(user)) for user in node.users)


def _is_seen(view: fx.Node) -> bool:
    return any(user.op == "output" or (user.target in VIEWS and _is_seen(user)) for user in view.users)


def _memory_of(node: fx.Node) -> fx.Node:
    """What a node is a view of."""
    while node.target in VIEWS:
        node = node.all_input_nodes[0]
    return node


def _layout(value: Tensor) -> str:
    # as text: comparing symbolic sizes would add a guard
    return f"{list(value.shape)} {value.stride()} {value.dtype} {value.device}"

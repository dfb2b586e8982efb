"""One quantize for all readers of an activation.

    before:  a, sa = quantize(x, e4m3, 1, 128);  b, sb = quantize(x, e4m3, 1, 128)
    after:   a, sa = quantize(x, e4m3, 1, 128), read in the place of b and sb too

Why: every linear layer quantizes its own input, and q_a_proj and kv_a_proj, gate_proj and up_proj have the same: each
further reader costs a launch, a read of x, and a write of its FP8 values and scales.
Requires: the same x, or the same views of it; the same format, block and kind of scale. Reads through ``dequantize``
are left apart: a matrix product takes its own in.
Numerics: exact.
"""

import operator

from torch import fx

from deepfuse.ir.printer import where
from deepfuse.ops.quantize import quantize
from deepfuse.passes.fusion import fusion
from deepfuse.passes.journal import note
from deepfuse.passes.value_numbers import ValueNumbers


@fusion(stage="quantize", saves="for each further reader a launch, a read of x and a write of its FP8 values")
def share_quantize(graph: fx.Graph) -> int:
    """Rewrite in place; returns the number of quantizations that went."""
    numbers = ValueNumbers([quantize.overload])
    first: dict[int, fx.Node] = {}
    of_operand: dict[int, fx.Node] = {}
    gone = 0
    for node in graph.find_nodes(op="call_function", target=quantize.overload):
        operand: fx.Node = node.args[0]
        same = first.setdefault(numbers.of(node), node)
        other = of_operand.setdefault(numbers.of(operand), node)
        if same is not node:
            note(f"quantize at {where(node)}: shared with that at {where(same)}")
            _merge(node, same)
            gone += 1
        elif other is not node:
            note(f"quantize at {where(node)}: stays: it is {_how(node)}, that at {where(other)} is {_how(other)}")
        else:
            note(f"quantize at {where(node)}: stays: it is the first of its operand")
    return gone


def _how(node: fx.Node) -> str:
    _, dtype, rows, cols, power_of_two = node.args
    return f"{str(dtype).removeprefix('torch.')} in {rows}x{cols}{' by powers of two' if power_of_two else ''}"


def _merge(node: fx.Node, into: fx.Node) -> None:
    """Let the readers of a call's results read those of an equal call before it."""
    results = {user.args[1]: user for user in into.users if user.target is operator.getitem}
    for user in list(node.users):
        result = results.setdefault(user.args[1], user)
        if result is user:
            user.args = (into, user.args[1])
        else:
            user.replace_all_uses_with(result)
            node.graph.erase_node(user)
    node.graph.erase_node(node)
    # they may have stood further down than the first reader does now
    for _, result in sorted(results.items(), reverse=True):
        into.append(result)

"""What a graph computes between its kernels, as Inductor does: elementwise calls, reductions and copies, fused into loops.

    kernel -> add -> mul -> kernel        one loop: reads what the kernels made and others left, writes what is read later

Calls are one loop where one reads the other and no kernel lies between them. A loop takes its bytes and a launch; what it
computes is little beside that. A constant is computed wherever it is read, and is in no loop. Of a table that is read at some places (an embedding), as much is read as comes out.
Source: the loop fusion of torch/_inductor/scheduler.py, in the cases where it has no reason against it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, fx

from deepfuse.ir.cost import tensor_bytes
from deepfuse.passes.sites import CALL, MATMULS
from deepfuse.profiling.view_ops import aten, is_view

GATHERS = (aten.embedding, aten.index, aten.index_select, aten.gather)
"""Read their first operand at some places; each of these is as large as what comes out."""
NAMESPACES = ("aten", "prims", "inductor")
"""Of calls that Inductor makes loops of; products apart."""


@dataclass(frozen=True, slots=True)
class Loop:
    """One of them: its calls in order, and the bytes it reads and writes."""

    nodes: tuple[fx.Node, ...]
    bytes: int


def fused_loops(graph: fx.Graph) -> list[Loop]:
    """All of a lowered graph whose sizes are numbers."""
    source: dict[fx.Node, fx.Node] = {}
    above: dict[fx.Node, int] = {}
    behind: dict[fx.Node, int] = {}
    loop_of: dict[fx.Node, _Group] = {}
    for number, node in enumerate(graph.nodes):
        source[node] = source[node.args[0]] if _is_view(node) else node  # type: ignore[index]
        above[node], behind[node] = 1 << number, 0
        for n in node.all_input_nodes:
            above[node] |= above[n]
            behind[node] |= behind[n] if _is_loop(n) or _is_view(n) else above[n]
        if not _is_loop(node):
            continue
        group = _Group([node], 1 << number, behind[node])
        for n in dict.fromkeys(source[n] for n in node.all_input_nodes):
            other = loop_of.get(n)
            if other is None or other is group or other.members & group.behind or group.members & other.behind:
                continue
            group = _Group([*other.nodes, *group.nodes], other.members | group.members, other.behind | group.behind)
            loop_of |= dict.fromkeys(group.nodes, group)
        loop_of[node] = group
    found = {id(group): group for group in loop_of.values()}
    return [Loop(tuple(group.nodes), _bytes(group.nodes, source)) for group in found.values()]


@dataclass(frozen=True, slots=True)
class _Group:
    """Calls of a loop so far; as sets of bits, these, and all that lies before a kernel that lies before one of them."""

    nodes: list[fx.Node]
    members: int
    behind: int


def _bytes(nodes: list[fx.Node], source: Mapping[fx.Node, fx.Node]) -> int:
    inside = set(nodes)
    read: dict[fx.Node, int] = {}
    written = 0
    for node in nodes:
        for n in node.all_input_nodes:
            if source[n] not in inside:
                gathered = getattr(node.target, "overloadpacket", None) in GATHERS and n is node.args[0]
                # a view of a part is read as far as it goes
                read[n] = 0 if _is_constant(source[n]) else max(read.get(n, 0), _size(node if gathered else n))
        if any(user not in inside for user in _readers(node)):
            written += _size(node)
    return sum(read.values()) + written


def _readers(node: fx.Node) -> set[fx.Node]:
    """Of a result, or of views of it."""
    found: set[fx.Node] = set()
    for user in node.users:
        found |= _readers(user) if _is_view(user) else {user}
    return found


def _is_view(node: fx.Node) -> bool:
    return node.op == "call_function" and is_view(node.target) and isinstance(node.args[0], fx.Node)


def _is_constant(node: fx.Node) -> bool:
    """``full``, ``arange`` and the like, of sizes that are numbers."""
    return node.op == "call_function" and not node.all_input_nodes


def _is_loop(node: fx.Node) -> bool:
    if node.op != "call_function" or CALL in node.meta or _is_view(node) or _is_constant(node):
        return False
    # what is written back to an input at the end was made in its place
    if getattr(node.target, "overloadpacket", None) in (*MATMULS, aten.copy_):
        return False
    return getattr(node.target, "namespace", "") in NAMESPACES


def _size(node: fx.Node) -> int:
    value = node.meta.get("val")
    values = value if isinstance(value, tuple | list) else [value]
    return int(tensor_bytes(*(v for v in values if isinstance(v, Tensor))))

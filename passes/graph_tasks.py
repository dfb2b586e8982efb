"""A graph's nodes as tasks of a schedule: what each costs, what must come before it, and the memory it makes and reads.

An op of ours costs what it says (``Op.cost``), what torch knows the FLOPs of these and its bytes, other calls the bytes they
read and write, views nothing; collectives hold the link (:mod:`deepfuse.passes.collective_seconds`). Inductor computes chains of elementwise calls in one kernel: of these the bytes are an upper bound.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import flop_registry

from deepfuse.ir.cost import Cost
from deepfuse.ir.device import Device
from deepfuse.ir.link import Link
from deepfuse.ir.op import NAMESPACE, OPS, Op
from deepfuse.ir.private import COLLECTIVES, collectives, storage_id
from deepfuse.passes.balanced_sizes import ALL_TO_ALL, BalancedSizes
from deepfuse.passes.collective_seconds import collective_of, collective_seconds
from deepfuse.passes.match import VIEWS
from deepfuse.passes.mutation import is_mutation, mutation_arguments
from deepfuse.passes.overlap_schedule import Task

WAIT = collectives.wait_tensor.default
_LOOPS = {"aten", "prims", "inductor"}
"""Namespaces of what Inductor makes loops of; but for products, and what it has no loops for."""
MATMULS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm)


@dataclass(frozen=True, slots=True)
class GraphTasks:
    """The calls of a graph in order, a task for each, and the bytes of the inputs, weights among them."""

    nodes: list[fx.Node]
    tasks: list[Task]
    given: dict[int, int]


def graph_tasks(graph: fx.Graph, sizes: BalancedSizes, device: Device, link: Link) -> GraphTasks:
    """Tasks of all nodes but placeholders and the output.

    Args:
        sizes: numbers for the graph's sizes.
        device, link: what computes, and what carries the messages. All-to-alls are to be moved; other collectives hold the
            link where they stand.
    """
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    number = {node: i for i, node in enumerate(nodes)}
    inputs = graph.find_nodes(op="placeholder")
    # AOTAutograd's names: a backward graph has gradients among its inputs, and what the forward one left for it, which goes
    backward = any("tangents" in node.name for node in inputs)
    stay = [node for node in inputs if not backward or node.name.startswith("primals")]
    given = {storage: sizes.bytes(value) for node in inputs for storage, value in _storages(node).items()}
    made = set(given)
    kept = {storage for node in (*stay, *graph.output_node().all_input_nodes) for storage in _storages(node)}
    written = _writes(nodes)
    tasks: list[Task] = []
    lazy: set[fx.Node] = set(inputs)
    for node in nodes:
        storages = _storages(node)
        if _is_loop(node) and node not in written and lazy.issuperset(node.all_input_nodes):
            lazy.add(node)
        makes = {storage: sizes.bytes(value) for storage, value in storages.items() if storage not in made}
        made |= makes.keys()
        reads = {storage for n in node.all_input_nodes for storage in _storages(n)} | makes.keys()
        start = collective_of(node)
        if start is not None:  # until then the message is read
            reads |= {storage for n in start.all_input_nodes for storage in _storages(n)}
        after = {number[n] for n in (*node.all_input_nodes, *written.get(node, ())) if n in number}
        held, moves = collective_seconds(node, sizes, link), node.target is ALL_TO_ALL
        tasks.append(
            Task(
                seconds=_seconds(node, sizes, device),
                after=tuple(sorted(after)),
                link_seconds=held if moves else None,
                held=None if moves else held,
                start=None if start is None else number[start],
                makes=makes,
                reads=frozenset(reads - kept),
                # Inductor computes it in the loops that read it
                lazy=node in lazy,
            )
        )
    return GraphTasks(nodes, tasks, given)


def is_kernel(node: fx.Node) -> bool:
    """Whether Inductor calls it, a product or an op without loops, and fuses it into nothing."""
    namespace = getattr(node.target, "namespace", "")
    return getattr(node.target, "overloadpacket", None) in MATMULS or namespace not in (*_LOOPS, COLLECTIVES, "")


def _is_loop(node: fx.Node) -> bool:
    """Whether Inductor computes it where it is read, or it is no work at all."""
    collective = getattr(node.target, "namespace", "") == COLLECTIVES
    return node.op == "call_function" and not (is_kernel(node) or collective or node.is_impure())


def _storages(node: fx.Node) -> dict[int, Tensor]:
    """Memory of its results; of what shares one, the first."""
    found: dict[int, Tensor] = {}
    for value in torch.utils._pytree.tree_leaves(node.meta.get("val")):
        if isinstance(value, Tensor):
            found.setdefault(storage_id(value), value)
    return found


def _writes(nodes: list[fx.Node]) -> Mapping[fx.Node, list[fx.Node]]:
    """What is ordered though no data pass: a call that changes memory, or checks, and the calls before it on the same."""
    touched: dict[int, list[fx.Node]] = {}
    writer: dict[int, fx.Node] = {}
    checks: list[fx.Node] = []
    before: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        storages = {storage for n in node.all_input_nodes for storage in _storages(n)}
        changed = _changed(node)
        for storage in storages:
            if storage in writer:
                before.setdefault(node, []).append(writer[storage])
        for storage in changed:
            before.setdefault(node, []).extend(touched.get(storage, []))
        # torch keeps waits from being left out by calling them impure; their data alone order them
        if node.is_impure() and not changed and getattr(node.target, "namespace", "") != COLLECTIVES:
            before.setdefault(node, []).extend(checks[-1:])
            checks.append(node)
        for storage in storages:
            touched.setdefault(storage, []).append(node)
            if storage in changed and not is_mutation(node):
                writer[storage] = node
    return before


def _changed(node: fx.Node) -> set[int]:
    if is_mutation(node):
        return {storage for base in node.kwargs["_all_bases"] for storage in _storages(base)}  # type: ignore[union-attr, arg-type]
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return set()
    arguments = zip(node.target._schema.arguments, node.args, strict=False)
    named = [a for declared, a in arguments if declared.is_write]
    named += [node.kwargs[a.name] for a in node.target._schema.arguments if a.is_write and a.name in node.kwargs]
    return {storage for n in named if isinstance(n, fx.Node) for storage in _storages(n)}


def start_of(node: fx.Node) -> fx.Node | None:
    """What starts the all-to-all that a node waits for."""
    start = collective_of(node)
    return start if start is not None and start.target is ALL_TO_ALL else None


def _seconds(node: fx.Node, sizes: BalancedSizes, device: Device) -> float:
    if node.target in VIEWS or getattr(node.target, "namespace", "") == COLLECTIVES:
        return 0.0
    mutates = is_mutation(node)
    op = _op_of(node.args[0] if mutates else node.target)
    values = [v for n in (*node.all_input_nodes, node) for v in _leaves(n)]
    if not values:  # a size
        return 0.0
    floats = [v.dtype for v in values if v.dtype in device.flops]
    if op is not None:
        cost = op.cost(*sizes.arguments(node, mutation_arguments(node) if mutates else list(node.args)))
    else:
        cost = Cost(_flops(node, sizes), sum(sizes.bytes(v) for v in values))
    return device.seconds(cost, floats[0] if floats else torch.float32) + device.launch_seconds


def _leaves(node: fx.Node) -> list[Tensor]:
    return [v for v in torch.utils._pytree.tree_leaves(node.meta.get("val")) if isinstance(v, Tensor)]


def _op_of(target: Any) -> Op | None:
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != NAMESPACE:
        return None
    return OPS[target._opname]


def _flops(node: fx.Node, sizes: BalancedSizes) -> int:
    """Of products, convolutions and attention of ATen's, by torch's own formulas; of others none, which memory bounds."""
    formula = flop_registry.get(getattr(node.target, "overloadpacket", None))
    if formula is None:
        return 0
    args, kwargs, out = (sizes.arguments(node, part) for part in (list(node.args), dict(node.kwargs), node))
    return int(formula(*args, **kwargs, out_val=out))

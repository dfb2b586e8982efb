"""What a lowered graph launches, by a rule that stands in for Inductor, which generates no CUDA code without a driver.

- A call is a launch (or several: ``count_kernels``): a kernel of ours, and what Inductor leaves to a library (matrix
  products, attention, sorting). Views, allocations and what is known at compile time are none.
- Everything else is a loop. A loop is pointwise, over the elements of its result, or a reduction, over those of its
  operand: ``(outer, reduced)``.
- A pointwise result that only loops read is computed where it is read, as often as it is read, and never stored. Stored
  are reductions, and what calls or the graph's results need.
- Stored loops share a region, and a region is one launch, where (1) their sizes fit: equal numbers of elements, or a
  pointwise loop over the outer or over all elements of a reduction; two reductions only if both their sizes are equal;
  (2) one reads the other, or both read the same tensor; (3) nothing between them has to run after one and before the
  other.
- A region reads each tensor from outside once, as far as it looks at it (an index or a slice: what it takes out), and
  writes what is read outside. What is known of weights alone is no activation.

The rule is meant to be generous. Inductor often fuses less: it stores results with many readers, gives up on large
kernels, and copies what it cannot write in place. What it does beyond the rule is left out: a row's and a column's
reduction of one tensor in one kernel (its ``mix_order_reduction``), and epilogues of products that it tunes. It has not
been held against kernels that Inductor generates on a GPU.
Source: ``can_fuse`` and ``score_fusion`` of torch/_inductor/scheduler.py, ``can_fuse`` of codegen/simd.py, and
``StorageBox.mark_reuse`` of ir.py, torch 2.15.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx

from deepfuse.ir.cost import tensor_bytes
from deepfuse.ir.op import NAMESPACE, OPS
from deepfuse.passes.mutation import is_mutation, mutation_arguments
from deepfuse.profiling.kernel_count import ALLOCATIONS, count_kernels
from deepfuse.profiling.view_ops import is_view

aten = torch.ops.aten
Kind = Literal["matmul", "attention", "kernel", "region"]
MATMULS = {"mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "_scaled_mm", "_scaled_grouped_mm"}
ATTENTIONS = {"_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention"}
LIBRARY_CALLS = MATMULS | ATTENTIONS | {"topk", "sort", "nonzero", "unique", "searchsorted", "bucketize", "histc"}
"""Of ATen, by the name of the packet: one launch each."""
OUR_MATMULS = {
    "linear",
    "router_logits",
    "head_matmul",
    "absorb_query",
    "grouped_matmul",
    "grouped_matmul_wgrad",
    "fp8_matmul",
    "fp8_grouped_matmul",
    "fp8_grouped_matmul_masked",
}
OUR_ATTENTIONS = {"mla_attention", "mla_attention_backward", "mla_decode", "mla_decode_fp8", "mla_decode_project"}
REDUCTIONS = {
    *("sum", "mean", "amax", "amin", "max", "min", "prod", "any", "all", "argmax", "argmin", "var", "var_mean"),
    *("logsumexp", "linalg_vector_norm", "cumsum", "cumprod", "xor_sum"),
}
INDEXED = {"index", "gather", "embedding", "index_select"}
"""Read of their first operand as much as they give."""
SCATTERS = {"index_put": 2, "scatter": 3, "index_put_": 2, "slice_scatter": 1, "select_scatter": 1, "copy_": 1}
"""Write into their first operand, in place, what stands at this place among the arguments."""


@dataclass(slots=True)
class Launch:
    """A call, or a region of loops.

    Attributes:
        kind: what sort.
        name: op and provider of a call; what a region's stored loops compute, each once.
        kernels: how many launches it takes.
        activation_bytes: read and written of tensors that are not made of weights alone.
        weight_bytes: of the others.
    """

    kind: Kind
    name: str
    kernels: int
    activation_bytes: int
    weight_bytes: int
    nodes: tuple[fx.Node, ...]
    """The call, or the region's stored loops."""


@dataclass(slots=True)
class _Region:
    """Stored loops that run together."""

    loops: list[fx.Node]
    outer: int
    reduced: int
    """1 where all are pointwise."""
    reads: dict[fx.Node, int] = field(default_factory=dict)
    """Tensors from outside, as they are looked at -> bytes."""


def launches(graph: fx.Graph, weights: Collection[fx.Node]) -> list[Launch]:
    """Calls and regions of a graph that went through ``lower``, in an order in which they can run.

    Args:
        graph: with ``meta["val"]`` on every node; sizes must be known.
        weights: placeholders that are weights.
    """
    return _Counting(graph, weights).launches()


def _nodes_of(unit: fx.Node | _Region) -> list[fx.Node]:
    return unit.loops if isinstance(unit, _Region) else [unit]


class _Counting:
    def __init__(self, graph: fx.Graph, weights: Collection[fx.Node]):
        self.nodes = list(graph.nodes)
        self.of_weights = set(weights)
        """Weights, and what is made of them alone."""
        for node in self.nodes:
            inputs = node.all_input_nodes
            if node.op == "call_function" and inputs and all(n in self.of_weights for n in inputs):
                self.of_weights.add(node)
        self.sorts = {node: _sort(node) for node in self.nodes}
        for node in self.nodes:
            if node.target is aten.copy_.default and self._is_copied(node):
                self.sorts[node] = "loop"
        self.stored = {node for node in self.nodes if self.sorts[node] == "loop" and self._is_stored(node)}
        self.regions: list[_Region] = []
        self.region_of: dict[fx.Node, _Region] = {}

    def launches(self) -> list[Launch]:
        for node in self.nodes:
            if node in self.stored:
                self._place(node)
        units: list[fx.Node | _Region] = [node for node in self.nodes if self.sorts[node] == "call"]
        units = sorted([*units, *self.regions], key=lambda unit: self.nodes.index(_nodes_of(unit)[0]))
        owner = {node: i for i, unit in enumerate(units) for node in _nodes_of(unit)}
        order: dict[int, None] = {}

        def put(i: int) -> None:
            for before in sorted(self._owners_before(_nodes_of(units[i]), owner) - order.keys()):
                put(before)
            order[i] = None

        for i in range(len(units)):
            if i not in order:
                put(i)
        found = [units[i] for i in order]
        return [self._launch_of(unit) if isinstance(unit, _Region) else self._call(unit) for unit in found]

    def _owners_before(self, nodes: list[fx.Node], owner: Mapping[fx.Node, int]) -> set[int]:
        """The calls and regions whose results these nodes read, by way of what is computed where it is read."""
        own = owner[nodes[0]]
        pending, seen, found = list(nodes), set(nodes), set()
        while pending:
            for before in pending.pop().all_input_nodes:
                if owner.get(before, own) != own:
                    found.add(owner[before])
                elif before not in seen:
                    seen.add(before)
                    pending.append(before)
        return found

    def _is_copied(self, node: fx.Node) -> bool:
        """Whether a write to an input is a copy: loops, and calls that mutate, write there in the first place."""
        base = self._base(node.args[1])
        mutates = is_mutation(base)
        return self.sorts[base] == "nothing" or (self.sorts[base] == "call" and not mutates)

    # which loops are stored, and what a stored loop reads

    def _is_stored(self, node: fx.Node) -> bool:
        if _packet(node) in REDUCTIONS or _packet(node) in SCATTERS:
            return True
        return any(self.sorts[reader] in ("call", "result") for reader in self._readers(node))

    def _readers(self, node: fx.Node) -> Iterator[fx.Node]:
        """What reads the memory of a node, through views."""
        for user in node.users:
            if self.sorts[user] == "view":
                yield from self._readers(user)
            elif user.target is not aten.copy_.default or user.args[0] is not node:  # copy_ writes its first
                yield user

    def _reads(self, node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node, int]]:
        """Memory that a stored loop reads: whose, as seen through which node, and how many bytes of it."""
        pending, seen = self._read_args(node), set()
        while pending:
            arg = pending.pop()
            if arg in seen:
                continue
            seen.add(arg)
            base = self._base(arg)
            if self.sorts[base] == "loop" and base not in self.stored:
                pending += self._read_args(base)
            elif isinstance(arg.meta.get("val"), Tensor):
                yield base, arg, _looked_at(arg, [u for u in arg.users if self.sorts[u] == "loop"])

    def _read_args(self, node: fx.Node) -> list[fx.Node]:
        args = node.all_input_nodes
        # what is written in place is not read
        return [a for a in args if a is not node.args[0]] if _packet(node) in SCATTERS else args

    def _base(self, node: Any) -> fx.Node:
        while self.sorts[node] == "view":
            node = node.all_input_nodes[0]
        return node

    # regions

    def _place(self, node: fx.Node) -> None:
        """Into the last region that takes it, or into a new one."""
        outer, reduced = _sizes(node)
        reads = {arg: size for _, arg, size in self._reads(node)}
        bases = {self._base(arg) for arg in reads}
        for region in reversed(self.regions):
            fitting = _fit(region, outer, reduced)
            related = bases & (set(region.loops) | {self._base(arg) for arg in region.reads})
            if fitting is not None and related and not self._runs_between(region, bases):
                region.loops.append(node)
                region.outer, region.reduced = fitting
                region.reads |= reads
                break
        else:
            region = _Region([node], outer, reduced, reads)
            self.regions.append(region)
        self.region_of[node] = region

    def _runs_between(self, region: _Region, bases: Collection[fx.Node]) -> bool:
        """Whether something outside the region must run after it and before what reads ``bases``."""
        members = set(region.loops)
        pending, seen = [base for base in bases if base not in members], set()
        while pending:
            node = pending.pop()
            if node in members:
                return True
            if node not in seen:
                seen.add(node)
                # a region runs as a whole
                together = self.region_of[node].loops if node in self.region_of else [node]
                pending += [before for loop in together for before in loop.all_input_nodes]
        return False

    def _launch_of(self, region: _Region) -> Launch:
        members = set(region.loops)
        moved: dict[bool, int] = {False: 0, True: 0}
        looked_at: dict[fx.Node, int] = {}
        for arg, size in region.reads.items():
            base = self._base(arg)
            if base not in members:
                # in two ways, but it is read once
                looked_at[base] = min(looked_at.get(base, 0) + size, _nbytes(base))
        for base, size in looked_at.items():
            moved[base in self.of_weights] += size
        for loop in region.loops:
            if any(self._outside(reader, members) for reader in self._readers(loop)):
                moved[loop in self.of_weights] += _written(loop)
        name = " + ".join(dict.fromkeys(_packet(n) for n in region.loops))
        return Launch("region", name, 1, moved[False], moved[True], tuple(region.loops))

    def _outside(self, reader: fx.Node, members: set[fx.Node]) -> bool:
        """Whether a reader, or the stored loop it is computed in, stands outside."""
        if reader in members:
            return False
        if self.sorts[reader] == "loop" and reader not in self.stored:
            return any(self._outside(r, members) for r in self._readers(reader))
        return True

    # calls

    def _call(self, node: fx.Node) -> Launch:
        target, args = _called(node)
        name = _packet_name(target)
        tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
        outputs = [v for v in torch.utils._pytree.tree_leaves(node.meta["val"]) if isinstance(v, Tensor)]
        weights = [n for n in tensors if self._base(n) in self.of_weights]
        of_weights = tensor_bytes(*(n.meta["val"] for n in weights))
        whole = tensor_bytes(*(n.meta["val"] for n in tensors), *outputs)
        if target.namespace == NAMESPACE:
            op = OPS[name]
            provider = next(p for p in op.providers if p.name == (target._overloadname or ""))
            kind: Kind = "matmul" if name in OUR_MATMULS else "attention" if name in OUR_ATTENTIONS else "kernel"
            bytes_moved = int(op.cost(*args).bytes)
            if weights:
                # it may read a part of a weight, as of a cache: what the cost has grows by it with the width of the numbers
                part = int(op.cost(*_called(node, weights)[1]).bytes) - bytes_moved
                of_weights = min(of_weights, part) if part else of_weights
            if kind == "attention":
                # operands of a product that it does as well, and no more counted than those of one by itself
                bytes_moved -= of_weights
                of_weights = 0
            opaque = provider.name == "reference" or kind == "matmul" and provider.name == "torch"
            kernels = 1 if opaque else len(count_kernels(provider.fn, args))
            name = f"{name}.{provider.name}"
        else:
            kind = "matmul" if name in MATMULS else "attention" if name in ATTENTIONS else "kernel"
            bytes_moved, kernels = whole, 1
        # of a cache the cost has what is read, and of experts only those with rows
        activations = bytes_moved - of_weights if of_weights <= bytes_moved else whole - of_weights
        if node in self.of_weights:
            activations = 0
        return Launch(kind, name, kernels, activations, bytes_moved - activations, (node,))


def _sort(node: fx.Node) -> str:
    """``call``, ``loop``, ``view``, ``result`` (the end of the graph, or a write to an input) or ``nothing``."""
    if node.op == "output" or node.target is aten.copy_.default:
        return "result"
    if node.op != "call_function" or node.target in ALLOCATIONS or not _has_elements(node):
        return "nothing"
    if is_view(node.target):
        return "view"
    target, _ = _called(node)
    ours = getattr(target, "namespace", "") == NAMESPACE
    return "call" if ours or _packet_name(target) in LIBRARY_CALLS else "loop"


def _has_elements(node: fx.Node) -> bool:
    leaves = torch.utils._pytree.tree_leaves(node.meta.get("val"))
    return any(isinstance(v, Tensor) and v.numel() for v in leaves)


def _called(node: fx.Node, wider: Collection[fx.Node] = ()) -> tuple[Any, tuple[Any, ...]]:
    """The op of a call and the values of its arguments; an op that mutates stands inside of another.

    Of the arguments in ``wider`` each number takes twice its bytes.
    """
    target: Any = node.args[0] if is_mutation(node) else node.target
    args = mutation_arguments(node) if is_mutation(node) else list(node.args)
    return target, tuple(fx.map_arg(args, lambda n: _widened(n.meta["val"]) if n in wider else n.meta["val"]))


def _widened(x: Any) -> Tensor:
    widths = {1: torch.float16, 2: torch.float32, 4: torch.float64, 8: torch.complex128}
    return torch.empty_strided(x.shape, x.stride(), dtype=widths[x.element_size()], device="meta")


def _packet_name(target: Any) -> str:
    return target._opname if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", str(target))


def _packet(node: fx.Node) -> str:
    return _packet_name(node.target)


def _numel(node: fx.Node) -> int:
    leaves = torch.utils._pytree.tree_leaves(node.meta["val"])
    return max(int(v.numel()) for v in leaves if isinstance(v, Tensor))


def _sizes(node: fx.Node) -> tuple[int, int]:
    """Elements of the result, and of the operand for each of them."""
    name = _packet(node)
    if name in SCATTERS:
        value: Any = node.args[SCATTERS[name]]
        return (_numel(value) if isinstance(value, fx.Node) else 1), 1
    if name not in REDUCTIONS:
        return _numel(node), 1
    operand = _numel(node.all_input_nodes[0])
    if name.startswith("cum"):
        dim: Any = node.args[1]
        reduced = int(node.all_input_nodes[0].meta["val"].shape[dim])
        return operand // reduced, reduced
    return _numel(node), operand // _numel(node)


def _fit(region: _Region, outer: int, reduced: int) -> tuple[int, int] | None:
    """Sizes of the region with another loop in it; ``None`` where it does not fit."""
    if region.reduced > 1 and reduced > 1:
        return (outer, reduced) if (region.outer, region.reduced) == (outer, reduced) else None
    if region.reduced > 1:
        return (region.outer, region.reduced) if outer in (region.outer, region.outer * region.reduced) else None
    if reduced > 1:
        return (outer, reduced) if region.outer in (outer, outer * reduced) else None
    return (outer, 1) if region.outer == outer else None


def _looked_at(arg: fx.Node, loops: list[fx.Node]) -> int:
    """Bytes of a tensor that loops read: an expanded dimension counts once, and an index what it takes out."""
    value = arg.meta["val"]
    sizes = [int(n) for n, stride in zip(value.shape, value.stride(), strict=True) if stride != 0]
    elements = math.prod(sizes)
    if loops and all(_packet(n) in INDEXED and n.args[0] is arg for n in loops):
        elements = min(elements, sum(_numel(n) for n in loops))
    return elements * value.element_size()


def _written(node: fx.Node) -> int:
    if _packet(node) in SCATTERS:
        value: Any = node.args[SCATTERS[_packet(node)]]
        return tensor_bytes(value.meta["val"]) if isinstance(value, fx.Node) else 0
    return _nbytes(node)


def _nbytes(node: fx.Node) -> int:
    leaves = torch.utils._pytree.tree_leaves(node.meta["val"])
    return int(tensor_bytes(*(v for v in leaves if isinstance(v, Tensor))))

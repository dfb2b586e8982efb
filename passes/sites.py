"""Where each node of a lowered graph comes from: the module of the model, the op, and what the op should cost.

A site is one call of one op in one module: ``layers.3.self_attn.q_a_proj.linear``. :mod:`deepfuse.passes.lower` says
which op a node was lowered from (later rewrites may have left ``original_aten`` behind), Dynamo in which module it was
called. Nodes carry the number of their site, and so does the code that Inductor makes of them
(:func:`deepfuse.ir.private.capture`), together with the sites themselves. They stand in the journal as well.

Collectives (``torch.distributed._functional_collectives``) have a site each, however often a module calls them, and so
have the waits for them, which know their start.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx

from deepfuse.ir.cost import Cost, tensor_bytes
from deepfuse.ir.op import NAMESPACE, Op
from deepfuse.ir.private import SITE, SITE_TEXT
from deepfuse.ir.sizes import known_size
from deepfuse.passes.collective_call import collective_call

CALL = "deepfuse_call"
"""Entry of ``node.meta``: the :class:`OpCall` a node was lowered from."""

aten = torch.ops.aten
MATMULS = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm)
"""ATen's products, which gradients are made of: their costs are known without an op of ours."""
_FRAME = re.compile(r'File "(?:.*/)?(\w+)/(\w+)\.py", line \d+, in (\w+)')


@dataclass(frozen=True, slots=True, eq=False)
class OpCall:
    """One call of one of our ops; its costs as text, in the free sizes of the graph, ``None`` where they are unknown."""

    op: str
    dtype: str
    flops: str | None
    bytes: str | None


@dataclass(frozen=True, slots=True)
class Site:
    """One call of one op in one module."""

    number: int
    """In the order of the graph."""
    module: str
    """``layers.3.self_attn``; empty for what the model itself calls, outside of all its parts."""
    op: str
    dtype: str = ""
    """Of its first tensor of floats, where it is one of our ops."""
    flops: str | None = None
    bytes: str | None = None
    group: str = ""
    """Of what starts a collective: the name of its process group."""
    message: str | None = None
    """Bytes that this process brings to it, as text."""
    start: int | None = None
    """Of a wait: the number of the site that started the collective."""

    @property
    def name(self) -> str:
        return f"{self.module}.{self.op}" if self.module else self.op


def mark_call(node: fx.Node, op: Op, args: Iterable[Any]) -> None:
    """Note that ``node`` is a call of ``op`` with these values, for the nodes that will stand in its place."""
    args = tuple(args)
    floats = [a for a in args if isinstance(a, Tensor) and a.dtype.is_floating_point]
    dtype = _dtype(floats[0]) if floats else ""
    # where it is not known the time is measured all the same
    cost = known_size(lambda: op.cost(*args))
    flops, size = (None, None) if cost is None else (str(cost.flops), str(cost.bytes))
    node.meta[CALL] = OpCall(op.name, dtype, flops, size)


def number_sites(graph: fx.Graph) -> list[Site]:
    """All sites of a lowered graph, in its order; their numbers and texts are written into ``node.meta``."""
    numbers: dict[tuple[Any, ...], int] = {}
    found: list[dict[str, Any]] = []
    modules: dict[fx.Node, str] = {}
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    for node in nodes:
        call, module = node.meta.get(CALL), _module(node, modules)
        modules[node] = module
        name = _op_name(node) if call is None else call.op
        key: tuple[Any, ...] = (module, name) if call is None else (call,)
        facts = {} if call is None else {"dtype": call.dtype, "flops": call.flops, "bytes": call.bytes}
        collective = collective_call(node)
        if collective is not None:
            name, key, facts = collective["op"], (node,), collective
        if key not in numbers:
            numbers[key] = len(found)
            found.append({"module": module, "op": name, **facts})
        node.meta[SITE] = numbers[key]
    for number, (cost, dtype) in _products(nodes).items():
        found[number] |= {"flops": str(cost.flops), "bytes": str(cost.bytes), "dtype": dtype}
    sites = [Site(number, **facts) for number, facts in enumerate(found)]
    for node in nodes:
        node.meta[SITE_TEXT] = json.dumps(asdict(sites[node.meta[SITE]]))
    return sites


def _products(nodes: Iterable[fx.Node]) -> dict[int, tuple[Cost, str]]:
    """Number of a site -> the costs of all products of ATen's in it, and their dtype."""
    products: dict[int, tuple[Cost, str]] = {}
    for node in nodes:
        if CALL not in node.meta and _is_matmul(node):
            before, _ = products.get(node.meta[SITE], (Cost(0, 0), ""))
            products[node.meta[SITE]] = (before + _matmul_cost(node), _dtype(node.meta["val"]))
    return products


def _module(node: fx.Node, modules: Mapping[fx.Node, str]) -> str:
    """Where it was called; where nobody did (gradients of several readers are added up, a buffer is written back, Inductor
    of torch 2.11 makes an ``addmm`` of two nodes), the module of what was computed last of what it reads."""
    found = module_of(node)
    made = node.meta.get("partitioner_tag") == "is_backward" or not node.meta.get("stack_trace")
    nobody = made or node.target is aten.copy_.default
    if found or not nobody:
        return found
    before = [n for n in modules if n in node.all_input_nodes and modules[n]]
    return modules[before[-1]] if before else ""


def module_of(node: fx.Node) -> str:
    """Path of the module a node was called in, without the model's own name and without ``model.``, its decoder.

    Where the model itself called it, the function that did: ``norm.add``, in the file ``norm.py`` of the blocks.
    """
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    path = re.sub(r"^L\['\w+'\]\.?", "", list(stack.values())[-1][0]) if stack else ""
    path = re.sub(r"\[['\"]?(\w+)['\"]?\]", r".\1", path).removeprefix("model.").strip(".")
    if path and path != "model":
        return path
    frames = [f for f in _FRAME.findall(node.meta.get("stack_trace") or "") if f[0] not in ("ir", "ops", "distributed")]
    return "" if not frames or frames[-1][2] == "forward" else ".".join(frames[-1][1:])


def _op_name(node: fx.Node) -> str:
    forward = node.meta.get("fwd_source_fn_stack")
    if forward:  # a part of the gradient of what stands here
        of = forward[-1][1]
        if isinstance(of, torch._ops.OpOverload) and of.namespace == NAMESPACE:
            return f"{of._opname}_backward"
    # of a product and the sum it was fused into, the product says more
    origin = node.target if _is_matmul(node) else node.meta.get("original_aten") or node.target
    if isinstance(origin, torch._ops.OpOverload):
        return origin._opname
    return getattr(origin, "__name__", str(origin))


def _is_matmul(node: fx.Node) -> bool:
    return getattr(node.target, "overloadpacket", None) in MATMULS


def _matmul_cost(node: fx.Node) -> Cost:
    left, out = node.args[-2], node.meta["val"]
    flops = 2 * out.numel() * left.meta["val"].shape[-1]  # type: ignore[union-attr]
    return Cost(flops, tensor_bytes(*(n.meta["val"] for n in node.all_input_nodes), out))


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")

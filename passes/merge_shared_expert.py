"""The shared expert becomes one more of the routed experts, one that every token goes to.

    before:  weights, ids = route(logits, ..., 0);  rows, ... = expert_permute(x, ids, E)
             expert_unpermute(down(swiglu(gate_up(rows))), ..., weights) + down_s(swiglu(gate_s(x), up_s(x)))
    after:   weights, ids = route(logits, ..., 1);  rows, ... = expert_permute(x, ids, E + 1)
             expert_unpermute(down'(swiglu(gate_up'(rows))), ..., weights)

``gate_up'`` and ``down'`` multiply by ``as_strided`` of the routed weights: E + 1 matrices, the last of which are the
shared expert's. FP8 stands around these products as it stood around those before: a row is quantized by itself, so that
sorting it first does not change its numbers.
Why: at a decode step the shared expert costs a product of gate and up (two launches where K is split), a swiglu, a product
of down and a sum, which reads two activations and writes one. They go; the routed launches have T rows more, and the
weights read are the same.
Requires: at most 64 tokens, known at compile time. The tile of a grouped product is chosen for the rows of an average
expert: up to there the shared one's, of 16 rows, repeat in L2 while the routed weights come from memory; beyond, a product
of its own has tiles of its own. One shared expert of an expert's width (several stacked in one MLP do not lie as experts
do), computed in the same precision, its weights and scales behind the routed ones (FP8: widths of whole blocks of 128). A
device with launches to save: a CPU's graph stays as it is. Never in training. Under expert parallelism the shared expert
runs while tokens travel, and is no rank's own: there, leave this pass out. ``layout`` as in ``merge_projections``.
Numerics: reassociating; the routed sum is no more rounded before the shared expert's result is added to it.
Source: SGLang's fusion of shared experts does the same in its fused kernel for DeepSeek-V3.
"""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from deepfuse.ir.device import Device
from deepfuse.ir.printer import where
from deepfuse.ir.provider import at_most
from deepfuse.ops.dequantize import dequantize
from deepfuse.ops.expert_permute import expert_permute
from deepfuse.ops.expert_unpermute import expert_unpermute
from deepfuse.ops.grouped_matmul import grouped_matmul
from deepfuse.ops.linear import linear
from deepfuse.ops.quantize import quantize
from deepfuse.ops.route import route
from deepfuse.ops.swiglu import swiglu
from deepfuse.passes.adjacent_weights import as_one, first_in_memory, gap, unreadable
from deepfuse.passes.fusion import fusion
from deepfuse.passes.journal import note
from deepfuse.passes.match import CAST, VIEWS, op_name
from deepfuse.passes.splice import call

aten = torch.ops.aten
FEW_TOKENS = 64
"""Reckoned, not measured: four tiles of 16 rows for the shared expert, where most of 256 experts are read already."""


class _Apart(Exception):
    """Why a shared expert stays apart."""


@dataclass(frozen=True, slots=True)
class _Product:
    """A product, by one matrix or by one a group, with the conversions of what it reads and gives.

    Attributes:
        how: arguments of the quantize and dequantize of x, of the dequantize of the weight, and the dtype converted to.
        nodes: from x to the result.
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    scale: fx.Node | None
    how: tuple[Any, ...]
    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True, slots=True)
class _Site:
    """The two ways from x to their sum."""

    total: fx.Node
    unpermute: fx.Node
    permute: fx.Node
    route: fx.Node
    gate_up: _Product
    swiglu: fx.Node
    down: _Product
    shared: tuple[_Product, _Product, _Product]
    """gate, up and down."""


@fusion(stage="semantic", kind="reassociating", saves="the shared expert's two products, swiglu and sum: four launches")
def merge_shared_expert(graph: fx.Graph, *, device: Device, layout: str = "") -> int:
    """Rewrite in place; returns the number of shared experts merged. ``layout``: of the weights; empty: unknown."""
    count = 0
    for unpermute in list(graph.find_nodes(op="call_function", target=expert_unpermute.overload)):
        try:
            if device.kind == "cpu":
                raise _Apart("on a CPU launches are not what takes the time")
            if not layout:
                raise _Apart("nobody says that the weights lie side by side at every call")
            site = _site(unpermute)
            _check_weights(site)
        except _Apart as reason:
            note(f"expert_unpermute at {where(unpermute)}: apart: {reason}")
            continue
        _merge(graph, site)
        count += 1
        note(f"expert_unpermute at {where(unpermute)}: merged")
    return count


def _site(unpermute: Any) -> _Site:
    y, order, inverse, weights = unpermute.args
    permute = _source(order, expert_permute.overload)
    x, ids, _ = permute.args
    T = x.meta["val"].shape[0]
    if not at_most(T, FEW_TOKENS):
        raise _Apart(f"tokens are not known to be at most {FEW_TOKENS}, and its tiles would be those of a few rows")
    router = _source(ids, route.overload)
    if router.args[-1] != 0 or _source(weights, route.overload) is not router:
        raise _Apart("experts and weights do not come from one router without shared experts")
    total = next(iter(unpermute.users), None)
    if len(unpermute.users) != 1 or total is None or total.target is not aten.add.Tensor or total.kwargs:
        raise _Apart("its result is not added to that of a shared expert")
    other: Any = next((a for a in total.args if a is not unpermute), None)

    down, down_s = _product(y, grouped_matmul), _product(other, linear)
    mixed, mixed_s = _expect(down.x, swiglu.overload), _expect(down_s.x, swiglu.overload)
    gate_s, up_s = (_product(part, linear) for part in mixed_s.args)
    gate_up, half_views = _halves(mixed)
    if not gate_s.x is up_s.x is x:
        raise _Apart("the shared expert reads another input than the routed ones")
    if _source(gate_up.x, expert_permute.overload) is not permute or gate_up.x.args[1] != 0:
        raise _Apart("the first routed product does not read the sorted rows")
    places = (order, inverse, gate_up.node.args[2], down.node.args[2])
    if any(
        _source(place, expert_permute.overload) is not permute or place.args[1] != result
        for place, result in zip(places, (1, 2, 3, 3), strict=True)
    ):
        raise _Apart("order or offsets are not those of the sorted rows")
    if {gate_s.how, up_s.how} != {gate_up.how} or down_s.how != down.how:
        raise _Apart("shared and routed experts compute in different precision")
    if _form(total) != _form(unpermute):
        raise _Apart(f"the sum is {_form(total)}, that of the routed experts {_form(unpermute)}")

    ours = {total, unpermute, permute, *permute.users, *router.users, mixed, mixed_s, *half_views}
    ours.update(node for product in (gate_up, down, gate_s, up_s, down_s) for node in product.nodes)
    for node in (*ours - {total}, router):
        outside = [user for user in node.users if user not in ours]
        if outside:
            raise _Apart(f"the result of {op_name(node.target)} is read by {op_name(outside[0].target)} too")
    return _Site(total, unpermute, permute, router, gate_up, mixed, down, (gate_s, up_s, down_s))


def _expect(node: Any, target: Any) -> Any:
    found = getattr(node, "target", None)
    if found is not target:
        raise _Apart(
            f"{'nothing' if found is None else op_name(found)} stands where {op_name(target)} does in a mixture of experts"
        )
    return node


def _source(result: Any, target: Any) -> Any:
    """The call that this is one of several results of."""
    return _expect(_expect(result, operator.getitem).args[0], target)


def _product(result: Any, op: Any) -> _Product:
    """What a product reads, and how; ``result`` is its own, or converted."""
    nodes, dtype = [], None
    if getattr(result, "target", None) is CAST:
        nodes.append(result)
        result, dtype = result.args
    product = _expect(result, op.overload)
    x, weight, last = product.args
    if op is linear and last is not None:
        raise _Apart("a product of the shared expert has a bias")
    nodes.append(product)
    scale = None
    of_weight: list[Any] = []
    of_values: list[Any] = []
    of_quantize: list[Any] = []
    if getattr(weight, "target", None) is dequantize.overload:
        nodes.append(weight)
        weight, scale, *of_weight = weight.args
    if getattr(x, "target", None) is dequantize.overload:
        values, x_scale, *of_values = x.args
        rounded = _source(values, quantize.overload)
        if [values.args[1], x_scale.args] != [0, (rounded, 1)]:
            raise _Apart("an activation and its scales come from different quantizations")
        nodes += [x, values, x_scale, rounded]
        x, *of_quantize = rounded.args
    how = (tuple(of_quantize), tuple(of_values), tuple(of_weight), dtype)
    return _Product(product, x, weight, scale, how, tuple(nodes))


def _halves(mixed: fx.Node) -> tuple[_Product, set[fx.Node]]:
    """The product whose columns are gate and up, one behind the other, and the views of it between."""
    between, ends = set(), []
    for node in mixed.all_input_nodes:
        while node.target in VIEWS:
            between.add(node)
            node = node.all_input_nodes[0]
        ends.append(node)
    whole: Tensor = ends[0].meta["val"]
    M, N = whole.shape[0], whole.shape[-1]
    halves = [node.meta["val"] for node in mixed.all_input_nodes]
    begins = [half.storage_offset() - whole.storage_offset() for half in halves]
    rows = {(half.shape[0], half.stride()) for half in halves}
    if ends[0] is not ends[-1] or begins != [0, N // 2] or rows != {(M, (N, 1))}:
        raise _Apart("gate and up of the routed experts are no halves of one product")
    return _product(ends[0], grouped_matmul), between


def _form(node: fx.Node) -> tuple[Any, ...]:
    value = node.meta["val"]
    return value.dtype, tuple(value.shape), value.stride()


def _check_weights(site: _Site) -> None:
    gate_s, up_s, down_s = site.shared
    _, rows, _ = site.gate_up.weight.meta["val"].shape
    width, shared = site.down.weight.meta["val"].shape[2], down_s.weight.meta["val"].shape[1]
    if shared != width:
        raise _Apart(f"it is {shared} wide, an expert {width}: several experts in one do not lie as experts do")
    if rows != 2 * width:
        raise _Apart(f"an expert's {width} rows of gate are filled up to {rows // 2}, blocks of 128, its own are not")
    for routed, own in ((site.gate_up, (gate_s, up_s)), (site.down, (down_s,))):
        for part in ("weight", "scale"):
            nodes = [getattr(product, part) for product in (routed, *own)]
            if nodes[0] is not None:
                _check_memory(nodes)


def _check_memory(nodes: list[fx.Node]) -> None:
    """That matrices lie behind those of a stack, and are together one more of them."""
    problems = [unreadable(node) for node in nodes]
    stack, *matrices = (node.meta["val"] for node in nodes)
    if not any(problems):
        problems = [gap(a, b) for a, b in zip((stack, *matrices), matrices, strict=False)]
        if sum(len(m) for m in matrices) != stack.shape[1]:
            problems.append(f"its {[len(m) for m in matrices]} rows are not the {stack.shape[1]} of an expert")
        if first_in_memory(nodes[0]) is None:
            problems.append("no input begins where the memory of the experts does")
    for problem in problems:
        if problem:
            raise _Apart(f"its weights do not lie behind the experts': {problem}")


def _merge(graph: fx.Graph, site: _Site) -> None:
    like = site.permute
    with graph.inserting_before(site.total):
        routed = call(graph, site.route, route.overload, *site.route.args[:-1], 1)
        weights, ids = _results(graph, routed, 2)
        x, _, num_experts = site.permute.args
        permuted = call(graph, like, expert_permute.overload, x, ids, num_experts + 1)  # type: ignore[operator]
        rows, order, inverse, offsets = _results(graph, permuted, 4)
        whole = _again(graph, site.gate_up, rows, offsets)
        width = whole.meta["val"].shape[1] // 2
        halves = (call(graph, site.swiglu, aten.slice.Tensor, whole, 1, i * width, (i + 1) * width) for i in range(2))
        mixed = call(graph, site.swiglu, swiglu.overload, *halves)
        y = _again(graph, site.down, mixed, offsets)
        out = call(graph, site.unpermute, expert_unpermute.overload, y, order, inverse, weights)
    site.total.replace_all_uses_with(out)
    graph.eliminate_dead_code()


def _again(graph: fx.Graph, product: _Product, x: fx.Node, offsets: fx.Node) -> fx.Node:
    """The same product of other rows, by one matrix more."""
    of_quantize, of_values, of_weight, dtype = product.how
    like = product.node

    def one_more(stack: fx.Node) -> fx.Node:
        value: Tensor = stack.meta["val"]
        return as_one(graph, like, stack, [value.shape[0] + 1, *value.shape[1:]])

    weight = one_more(product.weight)
    if product.scale is not None:
        weight = call(graph, like, dequantize.overload, weight, one_more(product.scale), *of_weight)
    if of_quantize:
        rounded = call(graph, like, quantize.overload, x, *of_quantize)
        x = call(graph, like, dequantize.overload, *_results(graph, rounded, 2), *of_values)
    y = call(graph, like, grouped_matmul.overload, x, weight, offsets)
    return y if dtype is None else call(graph, like, CAST, y, dtype)


def _results(graph: fx.Graph, node: fx.Node, number: int) -> list[fx.Node]:
    return [call(graph, node, operator.getitem, node, i) for i in range(number)]

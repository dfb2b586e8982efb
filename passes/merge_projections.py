"""Projections of one input whose weights lie side by side become one product.

    before:  a = linear(x, w_a);  b = linear(x, w_b)                   q_a_proj and kv_a_proj, gate_proj and up_proj
    after:   y = linear(x, as_strided(w_a, [N_a + N_b, K]));  a = y[:, :N_a];  b = y[:, N_a:]

Why: a launch and a read of x saved for each product that went, and one product of N_a + N_b columns fills a GPU that
two would leave half empty one after the other. Weights are inputs of the graph, so that the runtime must have laid them
out: putting them together here would copy them at every call.
Requires: weights in one storage, one behind the other, and an input of the graph at its beginning; no biases. FP8
weights: their scales lie likewise, and all but the last have a multiple of 128 rows, for scales of 128 x 128 know no
other borders. Never in training, where the optimizer owns the weights. ``layout`` is the caller's word that the graph
will only be called with weights that lie as they do now; it enters the key of the compile cache.
Numerics: reassociating; the same sums, but a product of another width may take them in another order.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from deepfuse.ir.printer import where
from deepfuse.ir.private import storage_id
from deepfuse.ops.dequantize import dequantize
from deepfuse.ops.linear import linear
from deepfuse.ops.quantize import quantize
from deepfuse.passes.adjacent_weights import as_one, first_in_memory, gap, unreadable
from deepfuse.passes.fusion import fusion
from deepfuse.passes.journal import note
from deepfuse.passes.match import CAST, VIEWS
from deepfuse.passes.splice import call
from deepfuse.passes.value_numbers import ValueNumbers

aten = torch.ops.aten
_CONVERSIONS = (CAST, aten._to_copy.default)
"""The latter in graphs without Inductor's decompositions."""


@dataclass(frozen=True, slots=True)
class _Projection:
    """A product, and the inputs of the graph that it reads its weight from."""

    product: fx.Node
    weight: fx.Node
    scale: fx.Node | None

    @property
    def rows(self) -> int:
        return int(self.weight.meta["val"].shape[0])


@fusion(stage="semantic", kind="reassociating", saves="a launch and a read of the input for each product that went")
def merge_projections(graph: fx.Graph, *, layout: str = "") -> int:
    """Rewrite in place; returns the number of products that went. ``layout``: of the weights; empty: unknown."""
    numbers = ValueNumbers([quantize.overload, dequantize.overload])
    of_input: dict[int, list[fx.Node]] = {}
    for node in graph.find_nodes(op="call_function", target=linear.overload):
        of_input.setdefault(numbers.of(node.args[0]), []).append(node)
    gone = 0
    for products in of_input.values():
        if len(products) < 2:
            continue
        places = " and ".join(where(product) for product in products)
        if not layout:
            note(f"linear at {places}: apart: nobody says that the weights lie side by side at every call")
            continue
        for run in _runs(products):
            problem = _merge(graph, run)
            places = " and ".join(where(projection.product) for projection in run)
            note(f"linear at {places}: {problem or 'merged'}")
            gone += 0 if problem else len(run) - 1
    return gone


def _runs(products: list[fx.Node]) -> Iterator[list[_Projection]]:
    """Of products with one input, those whose weights lie one behind the other; says of the others why not."""
    found = []
    for product in products:
        projection = _projection(product)
        if isinstance(projection, str):
            note(f"linear at {where(product)}: apart: {projection}")
        else:
            found.append(projection)
    found.sort(key=lambda p: (storage_id(p.weight.meta["val"]), p.weight.meta["val"].storage_offset()))
    while found:
        run = [found.pop(0)]
        while found and (problem := _gap(run[-1], found[0])) is None:
            run.append(found.pop(0))
        if len(run) > 1:
            yield run
        else:
            why = f"the next in memory is that of {where(found[0].product)}: {problem}" if found else "it is the last"
            note(f"linear at {where(run[0].product)}: apart: no weight lies behind its own; {why}")


def _projection(product: fx.Node) -> _Projection | str:
    """What a product reads its weight from, or why that cannot be merged."""
    _, weight, bias = product.args
    if bias is not None:
        return "it has a bias"
    scale = None
    if isinstance(weight, fx.Node) and weight.target is dequantize.overload:
        weight, scale, *block, _ = weight.args
        if block != [128, 128]:
            return f"its weight is scaled in blocks of {block[0]} x {block[1]}"
    for node in (weight, scale):
        problem = None if node is None else unreadable(node)
        if problem:
            return problem
    return _Projection(product, weight, scale)  # type: ignore[arg-type]


def _gap(before: _Projection, after: _Projection) -> str | None:
    """``None`` if a weight lies right behind another, with its scales; or what lies between."""
    for a, b in ((before.weight, after.weight), (before.scale, after.scale)):
        if a is None or b is None:
            if a is not b:
                return "one is in FP8"
            continue
        problem = gap(a.meta["val"], b.meta["val"])
        if problem:
            return problem
    if before.scale is not None and before.rows % 128:
        return f"{before.rows} rows are no multiple of 128: a scale would be of rows of both"
    return None


def _merge(graph: fx.Graph, run: list[_Projection]) -> str | None:
    """One product in the place of several; or why not."""
    for node in (run[0].weight, run[0].scale):
        if node is not None and first_in_memory(node) is None:
            return "apart: no input begins where the memory of the first weight does"
    products = [p.product for p in run]
    first = min(products)
    results = [_converted(product) for product in products]
    if any(r is None for r in results) or len({str(r.args[1:]) + str(r.kwargs) for r in results if r}) > 1:
        results = list(products)
    widths = [p.rows for p in run]
    old = [r for r in results if r is not None]
    try:
        refreshed = _refreshed(old, widths)
    except (RuntimeError, ValueError) as error:
        return f"apart: a view of a result needs its rows side by side: {error}"
    like = products[0]
    with graph.inserting_before(first):
        weight = _together(graph, like, [p.weight for p in run])
        if run[0].scale is not None:
            scales = _together(graph, like, [p.scale for p in run if p.scale is not None])
            dtype = first.args[1].args[-1]  # type: ignore[union-attr]
            weight = call(graph, like, dequantize.overload, weight, scales, 128, 128, dtype)
        whole = call(graph, like, linear.overload, first.args[0], weight, None)
        if old[0] is not products[0]:
            whole = graph.call_function(old[0].target, (whole, *old[0].args[1:]), old[0].kwargs)  # type: ignore[arg-type]
            whole.meta["val"] = whole.target(whole.args[0].meta["val"], *whole.args[1:], **whole.kwargs)  # type: ignore[operator, union-attr]
        begin = 0
        for node, width in zip(old, widths, strict=True):
            rank = whole.meta["val"].ndim
            part = call(graph, node, aten.slice.Tensor, whole, rank - 1, begin, begin + width)
            node.replace_all_uses_with(part)
            begin += width
    for node, value in refreshed.items():
        node.meta["val"] = value
    for node in dict.fromkeys((*old, *products)):
        graph.erase_node(node)
    return None


def _together(graph: fx.Graph, like: fx.Node, parts: list[fx.Node]) -> fx.Node:
    """The matrix that the parts are the rows of."""
    rows = sum(int(part.meta["val"].shape[0]) for part in parts)
    return as_one(graph, like, parts[0], [rows, int(parts[0].meta["val"].shape[1])])


def _converted(product: fx.Node) -> fx.Node | None:
    """The conversion that is the only reader of a product, which is then made once."""
    users = list(product.users)
    return users[0] if len(users) == 1 and users[0].target in _CONVERSIONS else None


def _refreshed(results: list[fx.Node], widths: list[int]) -> dict[fx.Node, Any]:
    """The values of all views of the results, whose rows will lie further apart.

    Raises:
        RuntimeError, ValueError: there is no such view.
    """
    values: dict[fx.Node, Any] = {}
    begin = 0
    for result, width in zip(results, widths, strict=True):
        given: Tensor = result.meta["val"]
        with given.fake_mode:  # type: ignore[attr-defined]
            whole = given.new_empty((*given.shape[:-1], sum(widths)))
            values[result] = whole[..., begin : begin + width]
            pending = list(result.users)
            while pending:
                node = pending.pop()
                if node.op != "call_function" or node.target not in VIEWS:
                    continue
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values.get(n, n.meta.get("val")))
                values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
                pending += node.users
        begin += width
        del values[result]
    return values

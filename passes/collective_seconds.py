"""How long a collective of a graph holds the link: the formulas of :mod:`deepfuse.ir.link`, with the graph's sizes.

    all_to_all_single        its rows, balanced               all_reduce               what each process brings
    all_gather_into_tensor   what all have in the end         reduce_scatter_tensor    what each process brings

Others (broadcasts, messages from process to process) are taken for one message of what is brought: a bound, not nothing.
All are taken to travel over one link, which they hold one after the other.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from deepfuse.ir.link import Link, all_gather_seconds, all_reduce_seconds, all_to_all_seconds, reduce_scatter_seconds
from deepfuse.ir.private import COLLECTIVES, process_group
from deepfuse.passes.balanced_sizes import ALL_TO_ALL, BalancedSizes

_FORMULAS: Mapping[str, Callable[[Link, float, int], float]] = {
    "all_gather_into_tensor": all_gather_seconds,
    "reduce_scatter_tensor": reduce_scatter_seconds,
    "all_reduce": all_reduce_seconds,
}
"""By what names begin with: behind it come ``_``, ``_out`` and ``_coalesced``, of the same messages."""
_NO_MESSAGE = ("wait_tensor", "wait_tensors", "_wrap_tensor_autograd")


def collective_seconds(node: fx.Node, sizes: BalancedSizes, link: Link) -> float | None:
    """Of a call that starts a collective, from when the link is free; ``None`` of others."""
    target: Any = node.target
    if getattr(target, "namespace", "") != COLLECTIVES or target._opname in _NO_MESSAGE:
        return None
    names = [argument.name for argument in target._schema.arguments]
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    brought = _bytes(given[names[0]], sizes)
    if target is ALL_TO_ALL:
        return all_to_all_seconds(link, brought, len(given["output_split_sizes"]))
    kind = next((name for name in _FORMULAS if target._opname.startswith(name)), "")
    if not kind:
        return link.seconds(brought)
    group = str(getattr(given["group_name"], "group_name", given["group_name"]))
    ranks = given.get("group_size") or process_group(group).size()
    # what is gathered is as large as what all of them bring
    return _FORMULAS[kind](link, ranks * brought if kind.startswith("all_gather") else brought, ranks)


def collective_of(wait: fx.Node) -> fx.Node | None:
    """What starts the collective that a node waits for; ``None`` where it is no wait, or waits for an input's."""
    if getattr(wait.target, "namespace", "") != COLLECTIVES or wait.target._opname != "wait_tensor":  # type: ignore[union-attr]
        return None
    start: Any = wait.args[0]
    # one of several tensors
    while isinstance(start, fx.Node) and start.op == "call_function" and start.target.__name__ == "getitem":  # type: ignore[union-attr]
        start = start.args[0]
    started = isinstance(start, fx.Node) and getattr(start.target, "namespace", "") == COLLECTIVES
    return start if started else None


def _bytes(tensors: Any, sizes: BalancedSizes) -> int:
    values = [n.meta["val"] for n in (tensors if isinstance(tensors, list | tuple) else [tensors])]
    return sum(sizes.bytes(v) for v in torch.utils._pytree.tree_leaves(values) if isinstance(v, Tensor))

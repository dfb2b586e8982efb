"""The order in which a process issues collectives, as text: it must be everybody's, or messages go to the wrong readers.

Of a compiled graph it is the order of Inductor's code, which need not be that of the graph. Process groups are told by
the axes they are of, or else by the order in which they first come: their names need not be the same in every process.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping

from deepfuse.ir.private import COLLECTIVES, NOTED
from deepfuse.passes.journal import Journal
from deepfuse.passes.kernel_calls import kernel_calls
from deepfuse.passes.sites import Site

Call = tuple[str, str, str]
"""What starts a collective: its op, its process group, and the module and dtype it is of."""


def issued(sites: Iterable[Site]) -> list[Call]:
    """The collectives of a graph, in its order."""
    return [_call(site.op, site.group, site.module, site.dtype) for site in sites if site.group]


def issued_in(source: str) -> list[Call]:
    """The collectives of Inductor's Python, in its order; nothing where it does not say its sites."""
    lines = source.splitlines()
    noted = [json.loads(line.partition(NOTED)[2]) for line in lines if line.lstrip().startswith(NOTED)]
    starts = {site["number"]: site for site in noted if site["group"]}
    if not starts:
        return []
    calls = []
    for call in kernel_calls(lines):
        if f".{COLLECTIVES}." in call.name:
            own = [starts[n] for sites, _ in call.parts for n in sites if n in starts]
            calls += [_call(s["op"], s["group"], s["module"], s["dtype"]) for s in own]
    return calls


def _call(op: str, group: str, module: str, dtype: str) -> Call:
    return op, group, f"{module} {dtype}"


def order_of(calls: Iterable[Call], axes: Mapping[str, str]) -> str:
    """Number of collectives and a hash of their order. Messages may differ in size.

    Args:
        calls: of one graph.
        axes: process group -> what all processes call it.
    """
    groups: dict[str, int] = {}
    told = [f"{op} {axes.get(group) or groups.setdefault(group, len(groups))} {of}" for op, group, of in calls]
    return f"{len(told)} in the order {hashlib.sha256('; '.join(told).encode()).hexdigest()[:8]}"


def collective_orders(journal: Journal, axes: Mapping[str, str]) -> dict[str, str]:
    """For each graph that has collectives, :func:`order_of` them."""
    return {
        f"collectives of graph {number}, {graph.name}": order_of(graph.collectives, axes)
        for number, graph in enumerate(journal.graphs)
        if graph.collectives
    }

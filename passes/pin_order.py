"""Tie a graph's collectives, and what runs under them, to the order they stand in.

Inductor computes a graph in an order of its own: it takes the one of lower peak memory, for which a wait right behind its
start is best. So what runs under a transfer is told to come after its start, and each start after the one before it, which is the
order that all ranks have to share. The wait comes after both: it changes the memory that they are taken to look at.

    start;  x = mm(...);  y = wait(start)      x after start, y after x

Only calls are tied that Inductor makes kernels of their own: loops are fused, and go where they are read.
Source: torch/_inductor/fx_passes/control_dependencies.py.
"""

from torch import fx

from deepfuse.ir.private import SITE, pin
from deepfuse.passes.emitted_order import Flight
from deepfuse.passes.graph_tasks import is_kernel, start_of
from deepfuse.passes.overlap_all_to_all import PINNED


def pin_order(graph: fx.Graph) -> list[Flight]:
    """Tie what stands between a pinned start and its wait, in place; the last that is done to a graph before Inductor.

    Returns:
        The transfers, of a graph whose sites are numbered.
    """
    after: dict[fx.Node, list[fx.Node]] = {}
    under: dict[fx.Node, list[int]] = {}
    flights: list[Flight] = []
    last: fx.Node | None = None
    for node in graph.nodes:
        start = start_of(node)
        if start is not None and start in under:
            flights.append(Flight(start.meta[SITE], node.meta[SITE], tuple(under.pop(start))))
        elif PINNED in node.meta:
            if last is not None:
                after[node] = [last]
            under[node] = []
            last = node
        elif under and is_kernel(node):
            after[node] = list(under)
            for kernels in under.values():
                kernels.append(node.meta[SITE])
    pin(graph, after)
    return flights

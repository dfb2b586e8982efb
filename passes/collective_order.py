"""The order in which a process issues collectives, as text: it must be everybody's, or messages go to the wrong readers.

Process groups are told by the axes they are of, or else by the order in which they first come: their names need not be
the same in every process.
"""

import hashlib
from collections.abc import Mapping

from deepfuse.passes.journal import Journal


def collective_orders(journal: Journal, axes: Mapping[str, str]) -> dict[str, str]:
    """For each graph that has collectives: their number and a hash of their order. Messages may differ in size.

    Args:
        axes: process group -> what all processes call it.
    """
    found = {}
    for number, graph in enumerate(journal.graphs):
        groups: dict[str, int] = {}
        calls = [
            f"{s.op} {axes.get(s.group) or groups.setdefault(s.group, len(groups))}" for s in graph.sites if s.group
        ]
        if calls:
            name = f"collectives of graph {number}, {graph.name}"
            found[name] = f"{len(calls)} in the order {hashlib.sha256(' '.join(calls).encode()).hexdigest()[:8]}"
    return found

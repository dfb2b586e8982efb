"""The order in which a process issues collectives, as text: it must be everybody's, or messages go to the wrong readers.

Process groups are told by the order in which they first come, for their names need not be the same in every process.
"""

import hashlib

from deepfuse.passes.journal import Journal


def collective_orders(journal: Journal) -> dict[str, str]:
    """For each graph that has collectives: their number and a hash of their order. Messages may differ in size."""
    found = {}
    for number, graph in enumerate(journal.graphs):
        groups: dict[str, int] = {}
        calls = [f"{s.op} {groups.setdefault(s.group, len(groups))}" for s in graph.sites if s.group]
        if calls:
            name = f"collectives of graph {number}, {graph.name}"
            found[name] = f"{len(calls)} in the order {hashlib.sha256(' '.join(calls).encode()).hexdigest()[:8]}"
    return found

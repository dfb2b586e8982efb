"""Which nodes of a graph are known to have one value: the same node, or the same call of what has one value.

Graphs are functional, so that a call is settled by its target and arguments. Only calls of views and of the ops asked
for are compared: to know more costs more, and what passes want to be equal stands behind few calls.
Source: value numbering; Cocke and Schwartz 1970 (Programming Languages and Their Compilers), section 6.4.
"""

from collections.abc import Iterable
from typing import Any

from torch import fx

from deepfuse.passes.match import VIEWS


class ValueNumbers:
    """Equal numbers, equal values; nothing is said where numbers differ."""

    def __init__(self, targets: Iterable[Any] = ()):
        """``targets``: ops whose calls are compared, beside views."""
        self._targets = VIEWS | frozenset(targets)
        self._of_node: dict[fx.Node, int] = {}
        self._of_call: dict[str, int] = {}

    def of(self, node: fx.Node) -> int:
        """The number of a node's value. The graph before it must not change in between."""
        if node not in self._of_node:
            key = node.name
            if node.op == "call_function" and node.target in self._targets:
                # a text: symbolic sizes compared as numbers would add guards
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: f"value {self.of(n)}")  # type: ignore[arg-type, return-value]
                key = f"{node.target} {args} {kwargs}"
            self._of_node[node] = self._of_call.setdefault(key, len(self._of_call))
        return self._of_node[node]

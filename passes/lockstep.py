"""Run a rewritten graph in lockstep with the one before it: calls that both have go on with the values they had.

A difference is then seen where it is made, and goes no further: a number that is rounded otherwise early in a model may
send a token to another expert, after which all results differ, though nothing is wrong.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from deepfuse.ir.private import storage_id

_leaves = torch.utils._pytree.tree_leaves
Compare = Callable[[Tensor, Tensor], str | None]
"""What is wrong with the first beside the second; ``None`` where nothing is."""


class Recorded(fx.Interpreter):
    """A run whose calls are remembered, by name, with their values."""

    def __init__(self, gm: fx.GraphModule):
        super().__init__(gm, garbage_collect_values=False)
        self.calls: dict[str, tuple[fx.Node, Any]] = {}

    def run(self, *inputs: Any) -> Any:  # type: ignore[override]
        # what lies in an input's memory is written to there, and is no value of its own
        self._of_inputs = {storage_id(x) for x in inputs if isinstance(x, Tensor)}
        return super().run(*inputs)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "call_function" and all(self._can_stand_in(leaf) for leaf in _leaves(value)):
            self.calls[n.name] = n, value
        return value

    def _can_stand_in(self, leaf: Any) -> bool:
        # bytes are those of a cache in FP8, which only its readers know how to compare
        return isinstance(leaf, Tensor) and leaf.dtype != torch.uint8 and storage_id(leaf) not in self._of_inputs


class Lockstep(fx.Interpreter):
    """A run that compares each call with one of the same name and target, and goes on with that one's value."""

    def __init__(self, gm: fx.GraphModule, before: Recorded, compare: Compare):
        super().__init__(gm)
        self.before, self.compare = before, compare
        self.problem: str | None = None
        self._same: set[fx.Node] = {n for n in gm.graph.nodes if n.op == "placeholder"}

    def run_node(self, n: fx.Node) -> Any:
        known, had = self.before.calls.get(n.name, (None, None))
        if known is None or known.target != n.target:
            return super().run_node(n)
        self._same.add(n)
        untouched = str((n.args, n.kwargs)) == str((known.args, known.kwargs))
        if untouched and self._same.issuperset(n.all_input_nodes):
            return had
        value = super().run_node(n)
        for got, want in _pairs(value, had):
            problem = self.compare(got, want)
            if problem and self.problem is None:
                self.problem = f"{n.name}: {problem}"
        return had


def _pairs(got: Any, want: Any) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(_leaves(got), _leaves(want), strict=True)


def run_in_lockstep(
    before: fx.GraphModule, after: fx.GraphModule, inputs: Sequence[Sequence[Any]], compare: Compare
) -> tuple[list[Any], list[Any], str | None]:
    """Run two graphs, each on inputs of its own, equal in value.

    Returns:
        The results of both, flat, and what was wrong with the first call that both have and whose inputs were touched.
    """
    recorded = Recorded(before)
    with torch.no_grad():
        want = recorded.run(*inputs[0])
        beside = Lockstep(after, recorded, compare)
        got = beside.run(*inputs[1])
    return _leaves(want), _leaves(got), beside.problem

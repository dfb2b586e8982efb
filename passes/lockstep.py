"""Run a rewritten graph in lockstep with the one before it: calls that both have go on with the values they had.

A difference is then seen where it is made, and goes no further: a number that is rounded otherwise early in a model may
send a token to another expert, after which all results differ, though nothing is wrong.

Neither compared nor taken over is what lies in an input's memory, bytes (of a cache in FP8, which only its readers know
how to compare), and what gives no tensor. Whole numbers are taken over, and compared where nothing before them was
rewritten: what a rewritten number decides, a rounding may decide.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from deepfuse.ir.op import NAMESPACE
from deepfuse.ir.private import storage_id
from deepfuse.passes.collective_call import WAIT, is_collective

_leaves = torch.utils._pytree.tree_leaves
Compare = Callable[[Tensor, Tensor, int], str | None]
"""What is wrong with the first beside the second, which so many new calls led to; ``None`` where nothing is."""


class Recorded(fx.Interpreter):
    """A run whose calls are remembered, by name, with their values."""

    def __init__(self, gm: fx.GraphModule):
        super().__init__(gm)
        self.calls: dict[str, fx.Node] = {n.name: n for n in gm.graph.nodes if n.op == "call_function"}
        self.values: dict[str, Any] = {}

    def run(self, *inputs: Any) -> Any:  # type: ignore[override]
        # what lies in an input's memory is written to there, and is no value of its own
        self._of_inputs = {storage_id(x) for x in inputs if isinstance(x, Tensor)}
        return super().run(*inputs)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        # what is made of inputs alone, as weights in another dtype, is made again rather than kept: a model would be
        of_inputs = all(before.op == "placeholder" for before in n.all_input_nodes)
        if n.op == "call_function" and not of_inputs and all(self._can_stand_in(leaf) for leaf in _leaves(value)):
            self.values[n.name] = value
        return value

    def _can_stand_in(self, leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and leaf.dtype != torch.uint8 and storage_id(leaf) not in self._of_inputs


class Lockstep(fx.Interpreter):
    """A run that compares each call with one of the same name and target, and goes on with that one's value."""

    def __init__(self, gm: fx.GraphModule, before: Recorded, compare: Compare):
        super().__init__(gm)
        self.before, self.compare = before, compare
        self.problem: str | None = None
        self.distance: dict[fx.Node, int] = {}
        """0 of a value that is the other run's; else how many calls of ours, at least 1, have led to it since such values."""

    def run_node(self, n: fx.Node) -> Any:
        known, had = self.before.calls.get(n.name), self.before.values.get(n.name)
        rewritten = self.distance[n] = max((self.distance[before] for before in n.all_input_nodes), default=0)
        if n.op != "call_function":
            return super().run_node(n)
        if known is None or known.target != n.target:
            ours = getattr(n.target, "namespace", "") == NAMESPACE
            self.distance[n] = rewritten + 1 if ours else max(rewritten, 1)
            return super().run_node(n)
        touched = rewritten > 0 or str((n.args, n.kwargs)) != str((known.args, known.kwargs))
        if not touched:
            return super().run_node(n) if had is None else had
        value = super().run_node(n)
        if is_collective(n) and n.target._opname != WAIT:  # type: ignore[union-attr]
            return value  # still on its way
        if had is None:
            self.distance[n] = max(rewritten, 1)
            return value
        for got, want in zip(_leaves(value), _leaves(had), strict=True):
            decided = rewritten > 0 and not want.is_floating_point()
            problem = None if decided else self.compare(got, want, max(rewritten, 1))
            if problem and self.problem is None:
                self.problem = f"{n.name}: {problem}"
        self.distance[n] = 0
        return had


@dataclass(frozen=True, slots=True)
class Comparison:
    """What two runs gave."""

    want: list[Any]
    got: list[Any]
    problem: str | None
    """What was wrong with the first call that both have and whose inputs were touched."""
    distance: int
    """Calls of ours that led to a result, or to what was written, since calls that both have; at least 1."""


def run_in_lockstep(
    before: fx.GraphModule, after: fx.GraphModule, inputs: Sequence[Sequence[Any]], compare: Compare
) -> Comparison:
    """Run two graphs, each on inputs of its own, equal in value."""
    recorded = Recorded(before)
    with torch.no_grad():
        want = recorded.run(*inputs[0])
        beside = Lockstep(after, recorded, compare)
        got = beside.run(*inputs[1])
    return Comparison(_leaves(want), _leaves(got), beside.problem, max((1, *beside.distance.values())))

"""What a graph's all-to-alls cost as it stands, and in the best order there is: the figures that overlap is decided by.

All of it comes from the cost model, with balanced loads, so that every rank that has the same graph comes to the same.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from deepfuse.ir.device import Device
from deepfuse.ir.link import Link
from deepfuse.passes.balanced_sizes import ALL_TO_ALL, BalancedSizes
from deepfuse.passes.graph_tasks import GraphTasks, graph_tasks
from deepfuse.passes.overlap_orders import orders
from deepfuse.passes.overlap_schedule import Played, play
from deepfuse.passes.sites import module_of

MEMORY = 1.15
"""Times its peak before that memory may have, weights and results included."""
GAIN = 0.01
"""Of the predicted time, that an order must save: below that predictions say nothing."""
LATENCY = 0.08
"""Of the time of its transfers: a graph with more is left alone. On CPUs over Gloo, hiding them made a layer 10%
faster where it was 7%, and 7% slower at 11% (``benchmarks/overlap.py``, 128 and 16 tokens)."""
OTHERS = "the graph"
"""Whose work is no layer's."""
_LAYER = re.compile(r"layers\.\d+")


@dataclass(frozen=True, slots=True)
class Plan:
    """An order of a graph's calls.

    Attributes:
        work: the calls, and what they cost.
        order: numbers of the calls.
        before: what the graph comes to as it stands.
        after: what it comes to in this order.
        refused: why it stays as it stands; empty where it does not, and then ``order`` is another.
    """

    work: GraphTasks
    order: Sequence[int]
    before: Played
    after: Played
    refused: str = ""

    def owner(self, number: int) -> str:
        """The layer that a call belongs to."""
        found = _LAYER.match(module_of(self.work.nodes[number]))
        return found[0] if found else OTHERS

    def compute(self) -> Counter[str]:
        """Layer -> seconds that it computes."""
        found: Counter[str] = Counter()
        for number, task in enumerate(self.work.tasks):
            found[self.owner(number)] += task.seconds  # type: ignore[assignment]
        return found

    def travels(self, starts: Sequence[int]) -> float:
        """Seconds that messages of these starts are on the link."""
        return sum(self.work.tasks[start].link_seconds or 0.0 for start in starts)


def plan(graph: fx.Graph, device: Device, link: Link, tokens: int) -> Plan | None:
    """The best order of a graph's calls; ``None`` for a graph without all-to-alls, or without a link between ranks.

    Args:
        tokens: of a graph that serves any number of them.
    """
    starts = graph.find_nodes(op="call_function", target=ALL_TO_ALL)
    if not starts:
        return None
    work = graph_tasks(graph, BalancedSizes(graph, tokens), device, link)
    as_it_is = range(len(work.tasks))
    before = play(work.tasks, as_it_is, work.given, link.share)
    travels = sum(work.tasks[start].link_seconds or 0.0 for start in before.exposed)
    latency = len(starts) * link.latency
    if latency > LATENCY * travels:
        why = f"latency-bound: {milliseconds(latency)} of {milliseconds(travels)} are the link's latency"
        return Plan(work, as_it_is, before, before, why)
    order, after = _best(work, before, link.share)
    if after.seconds > (1 - GAIN) * before.seconds:
        why = (
            f"predicted {milliseconds(before.seconds)} as it is and {milliseconds(after.seconds)} at best within "
            f"{MEMORY} times the memory; "
            f"{milliseconds(sum(before.exposed.values()))} exposed, {milliseconds(latency)} of them the link's latency"
        )
        return Plan(work, as_it_is, before, before, why)
    return Plan(work, order, before, after)


def seconds_at(graph: fx.Graph, planned: Plan, device: Device, link: Link, tokens: int) -> float | None:
    """What a graph comes to in the order of a plan with another number of tokens; ``None`` where it is latency-bound."""
    work = graph_tasks(graph, BalancedSizes(graph, tokens), device, link)
    played = play(work.tasks, planned.order, work.given, link.share)
    travels = sum(work.tasks[start].link_seconds or 0.0 for start in played.exposed)
    return None if len(played.exposed) * link.latency > LATENCY * travels else played.seconds


def _best(work: GraphTasks, before: Played, busy: float) -> tuple[Sequence[int], Played]:
    best: tuple[Sequence[int], Played] = (range(len(work.tasks)), before)
    for order in orders(work.tasks):
        played = play(work.tasks, order, work.given, busy)
        if played.peak <= MEMORY * before.peak and played.seconds < (1 - GAIN / 10) * best[1].seconds:
            best = order, played
    return best


def milliseconds(seconds: float) -> str:
    """As it is printed."""
    return f"{seconds * 1e3:.3g} ms"

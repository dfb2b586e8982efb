"""All-to-alls run under the compute that does not need what they bring.

    before:  there = all_to_all_single(rows);  rows = wait(there);  y = experts(rows);  ...;  shared = mlp(x)
    after:   there = all_to_all_single(rows);  shared = mlp(x);  rows = wait(there);  y = experts(rows);  ...

Starts come as early as their inputs allow, waits as late as their readers do, and work that needs no message stands
between, as much as the cost model finds it to hide. Where several chains of collectives are independent, as those of
chunks of tokens or of halves of a batch, they alternate.
Why: on a link of a GPU's share of 50 GB/s, dispatch and combine of 4096 tokens of DeepSeek-V3 (8 experts each, 7168 wide,
bfloat16) take 19 ms, longer than the matrix products between them. What runs meanwhile costs nothing.
Requires: a link in the cost model, and a gain there: a graph that would not be faster stays as it is. Peak memory may grow
to 1.15 times. All ranks must come to the same order: costs are of balanced loads, and nothing is measured.
Numerics: exact; the calls are the same, in another order.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import fx

from deepfuse.ir.device import Device
from deepfuse.ir.link import Link
from deepfuse.passes.balanced_sizes import ALL_TO_ALL, BalancedSizes
from deepfuse.passes.graph_tasks import GraphTasks, graph_tasks
from deepfuse.passes.journal import note
from deepfuse.passes.overlap_schedule import Played, by_depth, play, schedule, starts_of
from deepfuse.passes.record import graph_pass
from deepfuse.passes.sites import module_of

MEMORY = 1.15
"""Times its peak before that memory may have, weights and results included."""
GAIN = 0.01
"""Of the predicted time, that an order must save: below that predictions say nothing."""
REACHES = (2, 4, 8, 16, 32)
"""Collectives that work may be moved across; the least that is as good as any: what is moved far lives long."""
PINNED = "deepfuse_pinned"
"""Entry of ``node.meta`` of a start whose place in the order is to be kept."""


@graph_pass(stage="communicate", kind="exact", saves="the time of an all-to-all, where there is other work to do")
def overlap_all_to_all(graph: fx.Graph, *, device: Device, link: Link | None = None, max_seq_len: int = 4096) -> int:
    """Rewrite in place; returns the number of all-to-alls that are hidden, in part at least.

    Args:
        link: that carries them; ``None`` leaves the graph as it is.
        max_seq_len: what the tokens are taken for, of a graph that serves any number of them.
    """
    starts = graph.find_nodes(op="call_function", target=ALL_TO_ALL)
    if not starts or link is None:
        return 0
    work = graph_tasks(graph, BalancedSizes(graph, max_seq_len), device, link)
    before = play(work.tasks, range(len(work.tasks)), work.given)
    order, after = _best(work, before)
    if after.seconds > (1 - GAIN) * before.seconds:
        note(
            f"refused: predicted {_ms(before.seconds)} as it is and {_ms(after.seconds)} at best within "
            f"{MEMORY} times the memory; "
            f"{_ms(sum(before.exposed.values()))} exposed, {_ms(len(starts) * link.latency)} of them the link's latency"
        )
        return 0
    _reorder(graph, work, order)
    for line in _explained(work, order, before, after):
        note(line)
    for start in starts:
        start.meta[PINNED] = True
    return sum(after.exposed[s] < before.exposed[s] for s in before.exposed)


def _best(work: GraphTasks, before: Played) -> tuple[Sequence[int], Played]:
    best: tuple[Sequence[int], Played] = (range(len(work.tasks)), before)
    for starts in dict.fromkeys((tuple(starts_of(work.tasks)), tuple(by_depth(work.tasks)))):
        for reach in REACHES:
            order = schedule(work.tasks, starts, reach)
            played = play(work.tasks, order, work.given)
            if played.peak <= MEMORY * before.peak and played.seconds < (1 - GAIN / 10) * best[1].seconds:
                best = order, played
    return best


def _reorder(graph: fx.Graph, work: GraphTasks, order: Sequence[int]) -> None:
    last = next(node for node in reversed(graph.nodes) if node.op == "placeholder")
    for number in order:
        last.append(work.nodes[number])
        last = work.nodes[number]


def _explained(work: GraphTasks, order: Sequence[int], before: Played, after: Played) -> list[str]:
    """A line for each module with all-to-alls: what hides them, its time and what stays exposed."""
    sites: dict[str, list[int]] = {}
    for number in before.exposed:
        sites.setdefault(module_of(work.nodes[number]) or "the graph", []).append(number)
    compute = sum(task.seconds for task in work.tasks)
    share = compute / max(len(sites), 1)
    lines = []
    for path, starts in sites.items():
        then, now = (sum(played.exposed[s] for s in starts) for played in (before, after))
        hiding = _between(work, order, starts)
        under = ", ".join(f"{name} {_ms(seconds)}" for name, seconds in hiding.most_common(2)) or "nothing"
        # compute between two of them is not any one's: each has an equal part of all
        lines.append(
            f"{path}: under {under}: predicted {_ms(share + then)} -> {_ms(share + now)}, "
            f"exposed {_ms(then)} -> {_ms(now)} of {_ms(sum(work.tasks[s].link_seconds or 0.0 for s in starts))}"
        )
    return lines


def _between(work: GraphTasks, order: Sequence[int], starts: Sequence[int]) -> Counter[str]:
    """Module -> seconds of its calls that stand between these starts and their waits."""
    found: Counter[str] = Counter()
    seen: set[int] = set()
    place = {number: i for i, number in enumerate(order)}
    for wait, task in enumerate(work.tasks):
        if task.start is not None and task.start in starts:
            seen.update(order[place[task.start] : place[wait]])
    for number in seen:
        if work.tasks[number].seconds:
            found[module_of(work.nodes[number]) or "others"] += work.tasks[number].seconds  # type: ignore[assignment]
    return found


def _ms(seconds: Any) -> str:
    return f"{seconds * 1e3:.3g} ms"

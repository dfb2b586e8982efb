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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from deepfuse.ir.device import Device
from deepfuse.ir.link import Link
from deepfuse.passes.balanced_sizes import ALL_TO_ALL
from deepfuse.passes.journal import graph_name, note
from deepfuse.passes.overlap_plan import Plan, milliseconds, plan
from deepfuse.passes.record import graph_pass
from deepfuse.passes.sites import module_of

PINNED = "deepfuse_pinned"
"""Entry of ``node.meta`` of a start whose place in the order is to be kept."""


@dataclass(frozen=True, slots=True)
class Decided:
    """What was decided of a graph before it was captured: the form it has, and why."""

    form: str
    why: tuple[str, ...] = ()


@graph_pass(stage="communicate", kind="exact", saves="the time of an all-to-all, where there is other work to do")
def overlap_all_to_all(
    graph: fx.Graph,
    *,
    device: Device,
    link: Link | None = None,
    max_seq_len: int = 4096,
    decided: Mapping[str, Decided] | None = None,
) -> int:
    """Rewrite in place; returns the number of all-to-alls that are hidden, in part at least.

    Args:
        link: that carries them; ``None`` leaves the graph as it is.
        max_seq_len: what the tokens are taken for, of a graph that serves any number of them.
        decided: of graphs by name, for the report.
    """
    form = (decided or {}).get(graph_name())
    for line in () if form is None else form.why:
        note(line)
    planned = None if link is None else plan(graph, device, link, max_seq_len)
    if planned is None:
        return 0
    if planned.refused:
        note(f"refused: {planned.refused}")
        return 0
    _reorder(graph, planned)
    for line in _explained(planned, "" if form is None else f"{form.form}, "):
        note(line)
    for start in graph.find_nodes(op="call_function", target=ALL_TO_ALL):
        start.meta[PINNED] = True
    before, after = planned.before.exposed, planned.after.exposed
    return sum(after[start] < before[start] for start in before)


def _reorder(graph: fx.Graph, planned: Plan) -> None:
    last = next(node for node in reversed(graph.nodes) if node.op == "placeholder")
    for number in planned.order:
        last.append(planned.work.nodes[number])
        last = planned.work.nodes[number]


def _explained(planned: Plan, form: str) -> list[str]:
    """A line for each layer with all-to-alls: what hides them, its time and what stays exposed."""
    layers: dict[str, list[int]] = {}
    for number in planned.before.exposed:
        layers.setdefault(planned.owner(number), []).append(number)
    compute = planned.compute()
    lines = []
    for layer, starts in layers.items():
        then, now = (sum(played.exposed[s] for s in starts) for played in (planned.before, planned.after))
        hiding = _between(planned, starts)
        under = ", ".join(f"{name} {milliseconds(seconds)}" for name, seconds in hiding.most_common(2)) or "nothing"
        own = compute[layer]
        lines.append(
            f"{layer}: {form}under {under}: predicted {milliseconds(own + then)} -> {milliseconds(own + now)}, exposed "
            f"{milliseconds(then)} -> {milliseconds(now)} of {milliseconds(planned.travels(starts))}"
        )
    return lines


def _between(planned: Plan, starts: Sequence[int]) -> Counter[str]:
    """Module -> seconds of its calls that stand between these starts and their waits."""
    work, found = planned.work, Counter[str]()
    seen: set[int] = set()
    place = {number: i for i, number in enumerate(planned.order)}
    for wait, task in enumerate(work.tasks):
        if task.start is not None and task.start in starts:
            seen.update(planned.order[place[task.start] : place[wait]])
    for number in seen:
        if work.tasks[number].seconds:
            found[module_of(work.nodes[number]) or "others"] += work.tasks[number].seconds  # type: ignore[assignment]
    return found

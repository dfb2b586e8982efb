"""Collectives of a run, and which calls of several processes are one.

A collective is started by one call and waited for by another (``torch.distributed._functional_collectives``); what runs
between the two hides it. The n-th of a group in a step is the n-th of the same step on all its processes: PyTorch's
backends pair them so. Where processes started different ones all the same, those in which they agree are paired, as many
as can be in order, and the others are lacking on somebody.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from deepfuse.passes.collective_call import WAIT
from deepfuse.passes.sites import Site
from deepfuse.profiling.intervals import Interval
from deepfuse.profiling.run import Run
from deepfuse.profiling.size_expression import evaluated
from deepfuse.profiling.timeline import Step

UNEVEN = {"all_to_all_single"}
"""Collectives to which processes may bring different sizes."""
Groups = Mapping[str, tuple[int, ...]]
"""Name of a process group -> its processes."""


@dataclass(frozen=True, slots=True)
class Collective:
    """One collective in one process, once. Times are nanoseconds.

    Attributes:
        op: ``all_to_all_single``.
        name: module and op; with a number where a module calls the op again.
        group: name, and processes, of the process group.
        step: number of the step among all of the run.
        bytes: that this process brings; ``None`` where they are not known.
        start: the call that starts it.
        waits: calls that wait for its end.
    """

    op: str
    name: str
    group: tuple[str, tuple[int, ...]]
    graph: str
    step: int
    bytes: int | None
    start: Interval
    waits: tuple[Interval, ...] = ()

    @property
    def arrived(self) -> int:
        return self.start[0]

    @property
    def ended(self) -> int:
        """When this process knew of its end."""
        return self.waits[-1][1] if self.waits else self.start[1]

    @property
    def kind(self) -> tuple[str, int | None]:
        """What it shares with the calls of other processes that are the same collective."""
        return self.op, None if self.op in UNEVEN else self.bytes

    def __str__(self) -> str:
        size = "" if self.bytes is None else f" of {self.bytes} bytes"
        return f"{self.name}{size} in step {self.step} ({self.graph})"


@dataclass(frozen=True, slots=True)
class Matched:
    """One collective of several processes.

    Attributes:
        calls: process -> its call.
        lacking: processes of the group that did not call it.
    """

    calls: Mapping[int, Collective]
    lacking: tuple[int, ...] = field(default=())

    @property
    def any_call(self) -> Collective:
        return next(iter(self.calls.values()))

    @property
    def last_arrival(self) -> int:
        return max(call.arrived for call in self.calls.values())


def collectives_of(run: Run, groups: Groups) -> list[Collective]:
    """All collectives of a run, in the order in which they were started.

    Raises:
        ValueError: a collective is of a group that ``groups`` does not have.
    """
    return [c for number, step in enumerate(run.steps) for c in _of_step(run, number, step, groups)]


def _of_step(run: Run, number: int, step: Step, groups: Groups) -> Iterator[Collective]:
    names = collective_names(run, step.graph)
    # a call of a graph starts each of its collectives once
    started: dict[int, tuple[Site, Interval, list[Interval]]] = {}
    for span in step.spans:
        part = run.parts[step.graph][span.kernel][span.part]
        for site in part.own if part.communicates else ():
            if site.group:
                started[site.number] = site, (span.began, span.ended), []
            elif site.op == WAIT and site.start in started:
                started[site.start][2].append((span.began, span.ended))
    for site, start, waits in started.values():
        if site.group not in groups:
            raise ValueError(f"collectives: want a group out of {sorted(groups)}, got {site.group!r} of {site.name}")
        group = site.group, groups[site.group]
        size = None if site.message is None else evaluated(site.message, step.sizes)
        sent = None if size is None else int(size)
        yield Collective(site.op, names[site.number], group, step.graph, number, sent, start, tuple(waits))


def collective_names(run: Run, graph: str) -> dict[int, str]:
    """Number of a site -> name, for the collectives of a graph."""
    sites = {
        s.number: s for kernel in run.parts[graph] for part in kernel for s in part.own if part.communicates and s.group
    }
    seen: Counter[str] = Counter()
    names = {}
    for number, site in sorted(sites.items()):
        seen[site.name] += 1
        names[number] = site.name if seen[site.name] == 1 else f"{site.name} #{seen[site.name]}"
    return names


def matched(of_process: Mapping[int, Sequence[Collective]]) -> list[Matched]:
    """Each collective once, with the calls of its processes; step by step, in order within a group.

    Args:
        of_process: process -> its collectives in order.
    """
    queues: dict[tuple[int, tuple[str, tuple[int, ...]]], dict[int, list[Collective]]] = {}
    for process, calls in of_process.items():
        for call in calls:
            queues.setdefault((call.step, call.group), {}).setdefault(process, []).append(call)
    found = []
    for (_, (_, members)), queue in sorted(queues.items(), key=lambda item: item[0][0]):
        present = [m for m in members if m in of_process]
        for row in _aligned({m: queue.get(m, []) for m in present}):
            found.append(Matched(row, tuple(m for m in present if m not in row)))
    return found


def _aligned(queue: Mapping[int, Sequence[Collective]]) -> list[dict[int, Collective]]:
    """Calls of the processes side by side, in order."""
    rows: list[dict[int, Collective]] = []
    for process, calls in queue.items():
        kinds = [next(iter(row.values())).kind for row in rows]
        pairs = common_order(kinds, [call.kind for call in calls])
        merged: list[dict[int, Collective]] = []
        i = j = 0
        for row, call in [*pairs, (len(rows), len(calls))]:
            merged += rows[i:row]
            merged += [{process: c} for c in calls[j:call]]
            if row < len(rows):
                merged.append({**rows[row], process: calls[call]})
            i, j = row + 1, call + 1
        rows = merged
    return rows


def common_order(a: Sequence[object], b: Sequence[object]) -> list[tuple[int, int]]:
    """Places of a longest common subsequence in both."""
    same = 0
    while same < min(len(a), len(b)) and a[same] == b[same]:
        same += 1
    pairs = [(i, i) for i in range(same)]
    i = j = same
    if i == len(a) or j == len(b):  # the rule: nothing is lacking
        return pairs
    longest = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for row in range(len(a) - 1, same - 1, -1):
        for column in range(len(b) - 1, same - 1, -1):
            both = longest[row + 1][column + 1] + 1 if a[row] == b[column] else 0
            longest[row][column] = max(both, longest[row + 1][column], longest[row][column + 1])
    while i < len(a) and j < len(b):
        if a[i] == b[j]:  # the nearest is never worse than one further on
            pairs.append((i, j))
            i, j = i + 1, j + 1
        elif longest[i + 1][j] >= longest[i][j + 1]:
            i += 1
        else:
            j += 1
    return pairs

"""Which process came last to a collective, by how much, and what it did longer than the others until then.

What a process did is looked at from the last moment at which all had met (the end of an earlier collective of the
group) to its arrival. Every moment of that has one name, a kernel's or that of what runs between kernels, so that with
two processes the differences by name add up to the lateness.
"""

import statistics
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deepfuse.profiling.collectives import Collective, Matched
from deepfuse.profiling.run import GUARDS, WRAPPER, Run

BETWEEN, BEFORE = "(between the steps)", "(before its first step)"

Activity = tuple[int, int, str]
"""Began, ended, and what was done."""


@dataclass(frozen=True, slots=True)
class Straggler:
    """Who came last to a collective.

    Attributes:
        process: who.
        late_ns: behind the median of the others.
        doing: what it did longer than the median of the others, the most longer.
        longer_ns: by how much.
    """

    process: int
    late_ns: int
    doing: str
    longer_ns: int


def activities(run: Run) -> list[Activity]:
    """What a process did, from the beginning of its first step to the end of its last, without a gap."""
    done: list[Activity] = []

    def until(moment: int, name: str) -> None:
        if done and moment > done[-1][1]:
            done.append((done[-1][1], moment, name))

    for step in run.steps:
        until(step.began, BETWEEN)
        # an empty one, so that there is a last
        done.append((step.began, step.began, GUARDS))
        if not run.parts[step.graph]:  # no compiled graph, as the optimizer's part of a training step
            until(step.ended, f"({step.graph})")
            continue
        until(step.code_began, GUARDS)
        for span in step.spans:
            until(span.began, WRAPPER)
            until(span.ended, run.parts[step.graph][span.kernel][span.part].name)
        until(step.code_ended, WRAPPER)
        until(step.ended, GUARDS)
    return [a for a in done if a[0] < a[1]]


def done_between(done: Sequence[Activity], began: int, ended: int) -> Counter[str]:
    """Nanoseconds by name within a window that ends no later than the last activity."""
    first = done[0][0] if done else ended
    times: Counter[str] = Counter()
    if began < first:
        times[BEFORE] = min(first, ended) - began
    at = max(bisect_right(done, began, key=lambda a: a[0]) - 1, 0)
    for began_, ended_, name in done[at:]:
        if began_ >= ended:
            break
        times[name] += max(min(ended_, ended) - max(began_, began), 0)
    return times


def straggler(
    collective: Matched, met: Mapping[int, int], done: Mapping[int, Sequence[Activity]], uncertainty_ns: float
) -> Straggler | None:
    """Who came last; ``None`` where the clocks cannot tell.

    Args:
        collective: of all processes that have activities.
        met: process -> when it left the collective at which all met before.
        done: process -> what it did.
        uncertainty_ns: how far the clocks of two processes may be off each other.
    """
    arrived = {process: call.arrived for process, call in collective.calls.items()}
    if len(arrived) < 2:
        return None
    last = max(arrived, key=lambda process: arrived[process])
    others = [process for process in arrived if process != last]
    late = arrived[last] - round(statistics.median(arrived[p] for p in others))
    if arrived[last] - max(arrived[p] for p in others) <= uncertainty_ns:
        return None
    began = min(met.values())
    times = {process: done_between(done[process], began, arrived[process]) for process in arrived}
    longer = {name: ns - statistics.median(times[p][name] for p in others) for name, ns in times[last].items()}
    doing = max(longer, key=lambda name: longer[name], default="")
    return Straggler(last, late, doing, round(longer.get(doing, 0)))


def met_before(earlier: Sequence[Matched], collective: Matched, began: Mapping[int, int]) -> dict[int, int]:
    """When each process left the last collective of the group at which all had met; the beginning of its run, if none.

    Args:
        earlier: collectives of the group before this one, in order.
        began: process -> beginning of its first step.
    """
    for candidate in reversed(earlier):
        calls = {p: candidate.calls.get(p) for p in collective.calls}
        if all(c is not None and c.waits and c.ended <= collective.calls[p].arrived for p, c in calls.items()):
            return {p: _ended(call) for p, call in calls.items()}
    return {process: began[process] for process in collective.calls}


def _ended(call: Collective | None) -> int:
    assert call is not None
    return call.ended

"""What communication costs a process: the time in which it waits for a collective and computes nothing.

    in flight = from the call that starts a collective to the end of the last wait for it
    exposed   = in its calls, with no kernel of the process's own running
      late    = the part of it before the last process had started the collective: somebody's work, not the link's
    hidden    = in flight, with kernels of its own running

A transfer that is over before anyone waits for it counts as hidden until the wait, as nothing says when it ended.
"""

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from deepfuse.profiling.collectives import Collective
from deepfuse.profiling.intervals import Interval, difference, intersection, length, union
from deepfuse.profiling.run import Run
from deepfuse.profiling.timeline import Step


@dataclass(frozen=True, slots=True)
class Exposure:
    """Of one collective in one process, in nanoseconds."""

    exposed_ns: int
    late_ns: int
    hidden_ns: int


def exposure(call: Collective, compute: Sequence[Interval], last_arrival: int) -> Exposure:
    """``compute``: when kernels of the process ran; ``last_arrival``: when the last process started the collective."""
    exposed = difference([call.start, *call.waits], compute)
    late = intersection(exposed, [(min(call.arrived, last_arrival), last_arrival)])
    return Exposure(length(exposed), length(late), length(intersection([(call.start[1], call.ended)], compute)))


def compute_of(run: Run, steps: Iterable[Step]) -> list[Interval]:
    """When kernels of a run computed."""
    return union(_spans(run, steps, communicating=False))


def _spans(run: Run, steps: Iterable[Step], *, communicating: bool) -> Iterator[Interval]:
    for step in steps:
        parts = run.parts[step.graph]
        for span in step.spans:
            if parts[span.kernel][span.part].communicates == communicating:
                yield span.began, span.ended


def exposed_ns(run: Run, step: Step) -> int:
    """Of one step: the time in calls of collectives with no kernel running."""
    return length(difference(_spans(run, [step], communicating=True), compute_of(run, [step])))


def exposed_share(run: Run, graph: str) -> float:
    """Exposed communication as a share of a graph's step, the median over the steps; no other process is needed."""
    return statistics.median(exposed_ns(run, s) / max(s.ended - s.began, 1) for s in run.steps_of(graph))

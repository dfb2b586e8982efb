"""Rows of what several processes paid for communication."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RankRow:
    """One process in one graph; times are microseconds a step, medians over the steps.

    Attributes:
        exposed_us: in calls of collectives, with no kernel of its own running.
        exposed_share: of the step.
        late_us: of the exposed time, until the last process had started the collective.
        hidden_us: with a collective in flight and kernels running.
        last: collectives to which it came last, by more than the clocks may be off.
    """

    rank: int
    graph: str
    step_us: float
    exposed_us: float
    exposed_share: float
    late_us: float
    hidden_us: float
    last: int


@dataclass(frozen=True, slots=True)
class CollectiveRow:
    """One collective of a graph; times are microseconds, medians over the steps of the mean over the processes.

    Attributes:
        bytes: of the process that brought most.
        transfer_us: from the last start until the last process knows of the end: no less than the transfer took.
        last: process that came last most often, ``None`` where the clocks cannot tell.
        last_in: in how many of the steps.
        behind_us: how much later than the others.
        doing: what it had been doing longer than the others.
    """

    graph: str
    name: str
    ranks: tuple[int, ...]
    steps: int
    bytes: int | None
    exposed_us: float
    late_us: float
    hidden_us: float
    transfer_us: float
    last: int | None
    last_in: int
    behind_us: float
    doing: str

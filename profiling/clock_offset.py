"""How far the clock of one process is from another's, and from which moment to which it drifted.

    reference = own + offset
    an answer arrives after it was sent:  replied - returned  <=  offset  <=  received - sent

A process asks another for its time, many times. Each answer bounds the offset from both sides, whatever the ways there
and back take; where the bounds of all answers overlap, there the offset lies, and what is taken is the middle, which is
off by no more than half of what is left. Asked before and after, a clock that runs fast or slow is set right between.
Source: NTP (RFC 5905, section 8) has these four times; that every answer bounds the offset is Marzullo's argument.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

ROUNDS = 64
"""Answers to one question about the time: on one machine some 50 us each."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One exchange, in nanoseconds.

    Attributes:
        sent, returned: by the clock of who asked.
        received, replied: by the reference.
    """

    sent: int
    received: int
    replied: int
    returned: int


@dataclass(frozen=True, slots=True)
class Offset:
    """What the reference is ahead of a clock around one moment.

    Attributes:
        at: of that clock.
        ns: to add to it.
        uncertainty_ns: how far ``ns`` may be off.
    """

    at: int
    ns: float
    uncertainty_ns: float


@dataclass(frozen=True, slots=True)
class Clock:
    """A clock whose offset was asked for twice: it drifts evenly in between."""

    before: Offset
    after: Offset

    def reference(self, own: int) -> int:
        """The reference's time at this moment of the clock."""
        elapsed = self.after.at - self.before.at
        drift = (self.after.ns - self.before.ns) / elapsed if elapsed > 0 else 0.0
        return own + round(self.before.ns + drift * (own - self.before.at))

    @property
    def uncertainty_ns(self) -> float:
        """How far a moment between the two may be off."""
        return max(self.before.uncertainty_ns, self.after.uncertainty_ns)


def offset_of(answers: Sequence[Answer]) -> Offset:
    """The offset that agrees with all answers of a short time.

    Raises:
        ValueError: there is none.
    """
    if not answers:
        raise ValueError("clock_offset: want at least one answer, got none")
    low = max(a.replied - a.returned for a in answers)
    high = min(a.received - a.sent for a in answers)
    # a clock that was set, or drifts fast, between the answers has no one offset: then they cross
    return Offset(round(statistics.median(a.sent for a in answers)), (low + high) / 2, abs(high - low) / 2)


def ask(
    question: Callable[[], tuple[int, int]], *, rounds: int = ROUNDS, now: Callable[[], int] = time.perf_counter_ns
) -> Offset:
    """The offset of this process's clock.

    Args:
        question: goes to the reference and comes back with the times at which it came there and left.
    """
    answers = []
    for _ in range(rounds):
        sent = now()
        received, replied = question()
        answers.append(Answer(sent, received, replied, now()))
    return offset_of(answers)


def exchange(group: Any, *, rounds: int = ROUNDS, now: Callable[[], int] = time.perf_counter_ns) -> Offset:
    """The offset to the clock of the group's first process; all processes of the group call it at once.

    Args:
        group: a process group of torch.distributed that takes tensors on the CPU.
    """
    import torch
    import torch.distributed as dist

    members = dist.get_process_group_ranks(group)
    first, rank = members[0], dist.get_rank()
    times = torch.zeros(2, dtype=torch.int64)

    def question() -> tuple[int, int]:
        dist.send(times, first, group=group)
        dist.recv(times, first, group=group)
        received, replied = times.tolist()
        return received, replied

    if rank != first:
        return ask(question, rounds=rounds, now=now)
    for member in members[1:]:
        for _ in range(rounds):
            dist.recv(times, member, group=group)
            times[0] = now()
            times[1] = now()
            dist.send(times, member, group=group)
    return Offset(now(), 0.0, 0.0)

"""In which order a graph's work hides its collectives: a list scheduler for one compute stream and one link.

A start puts its message on the link, behind those before it; compute goes on; a wait stands still until the message is
there, and what it stands still is *exposed*. Compute runs in any case, so that a step takes its compute and what is exposed.

Collectives are issued in a fixed order, the same on every rank. For the next one all that it needs is computed first. Where
that is behind a wait, other work fills the time until the message is there, as much as that time is, and no more: what
is early lives longer. Work that no collective needs (the gradient of a weight) is held back for such gaps, but not for
longer than ``reach`` collectives.
Source: list scheduling, Graham 1966; held-back weight gradients as filler: Lancet (arXiv:2404.19429), section 4.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

NEVER = 1 << 30
"""Number of a collective that does not come."""
SLACK = 1.1
"""Times its predicted duration that a message is covered for: real ones vary, and the work is there in any case."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One node.

    Attributes:
        seconds: of compute.
        after: numbers of the tasks that come before it.
        link_seconds: of what starts a collective that is scheduled: how long its message is on the link; ``None`` of others.
        held: likewise, of a collective that is not: it comes when it may, and holds the link.
        start: of a wait: the task that started what it waits for.
        makes: storage -> bytes that it allocates.
        reads: storages that it reads; until their last reader they live.
        lazy: whether it reads inputs alone, and is done when it is read: at any time, so that it is nothing to fill a gap
            with. All that comes before it is lazy.
    """

    seconds: float = 0.0
    after: tuple[int, ...] = ()
    link_seconds: float | None = None
    held: float | None = None
    start: int | None = None
    makes: Mapping[int, int] = field(default_factory=dict)
    reads: frozenset[int] = frozenset()
    lazy: bool = False


@dataclass(frozen=True, slots=True)
class Played:
    """What an order comes to.

    Attributes:
        seconds: of the step.
        exposed: start of a scheduled collective -> seconds that its waits stand still.
        peak: bytes that live at once.
    """

    seconds: float
    exposed: Mapping[int, float]
    peak: int


def play(
    tasks: Sequence[Task], order: Sequence[int], given: Mapping[int, int] | None = None, busy: float = 0.0
) -> Played:
    """Run an order of all tasks.

    Args:
        given: storage -> bytes of inputs; what is read goes when its last reader has run.
        busy: share of the device that a message takes from what is computed while it is on the link.
    """
    readers: dict[int, int] = {}
    for task in tasks:
        for storage in task.reads:
            readers[storage] = readers.get(storage, 0) + 1
    size = dict(given or {})
    live = peak = sum(size.values())
    clock = free = 0.0
    ends: dict[int, float] = {}
    exposed: dict[int, float] = {}
    for number in order:
        task = tasks[number]
        # until then the link is never idle, and this much of the task is done
        beside = (1 - busy) * max(free - clock, 0.0)
        clock += task.seconds + busy / (1 - busy) * min(task.seconds, beside)
        if task.link_seconds is not None:
            free = ends[number] = max(clock, free) + task.link_seconds
            exposed[number] = 0.0
        if task.held is not None:
            free = ends[number] = max(clock, free) + task.held
        if task.start is not None:
            if task.start in exposed:
                exposed[task.start] += max(ends[task.start] - clock, 0.0)
            clock = max(clock, ends[task.start])
        for storage, made in task.makes.items():
            size[storage] = made
            live += made
        peak = max(peak, live)
        for storage in task.reads:
            readers[storage] -= 1
            if not readers[storage]:
                live -= size.get(storage, 0)
    return Played(clock, exposed, peak)


def in_order(tasks: Sequence[Task]) -> range:
    """Numbers of the tasks: each comes after what it needs, as in a graph."""
    return range(len(tasks))


def schedule(tasks: Sequence[Task], starts: Sequence[int], reach: int, coarse: float) -> list[int]:
    """All tasks in an order that hides collectives.

    Args:
        tasks: in an order in which they could run.
        starts: all that start collectives, in the order in which they are issued.
        reach: collectives that work may be moved across.
        coarse: times a gap that what fills it may be long: what is longer delays the wait, and is missing in a later gap.
    """
    return _Scheduler(tasks, starts, reach, coarse).run()


class _Scheduler:
    def __init__(self, tasks: Sequence[Task], starts: Sequence[int], reach: int, coarse: float):
        self.tasks, self.starts, self.reach, self.coarse = tasks, starts, reach, coarse
        self.users: list[list[int]] = [[] for _ in tasks]
        for number, task in enumerate(tasks):
            for before in set(task.after):
                self.users[before].append(number)
        self.missing = [len(set(task.after)) for task in tasks]
        place = {start: k for k, start in enumerate(starts)}
        # the first collective that needs a task, and the last one that it needs
        self.need = [NEVER] * len(tasks)
        self.since = [-1] * len(tasks)
        for number in in_order(tasks):
            passed = (max(self.since[a], place.get(a, -1)) for a in tasks[number].after)
            self.since[number] = max(passed, default=-1)
        for number in reversed(in_order(tasks)):
            coming = (min(self.need[u], place.get(u, NEVER)) for u in self.users[number])
            self.need[number] = place.get(number, min(coming, default=NEVER))
            if self.need[number] == NEVER and self.users[number]:
                # what only they read waits with those who read it
                self.since[number] = max(self.since[number], min(self.since[u] for u in self.users[number]))
        self.ready: dict[int, list[int]] = {}
        self.waits: dict[int, list[int]] = {}
        self.order: list[int] = []
        self.placed: set[int] = set()
        self.clock = self.free = 0.0
        self.ends: dict[int, float] = {}
        for number in [n for n in in_order(tasks) if not self.missing[n]]:
            self._becomes_ready(number)

    def run(self) -> list[int]:
        for k, start in enumerate(self.starts):
            self._reach(k, start)
            self._issue(start)
            self._catch_up(k)
        self._finish()
        assert len(self.order) == len(self.tasks)
        return self.order

    def _becomes_ready(self, number: int) -> None:
        if self.tasks[number].lazy:  # it holds nobody up
            self._release(number)
            return
        waits = self.tasks[number].start is not None
        heapq.heappush((self.waits if waits else self.ready).setdefault(self.need[number], []), number)

    def _do(self, number: int) -> None:
        self._done(number)
        task = self.tasks[number]
        if task.start is not None:
            self.clock = max(self.clock, self.ends[task.start])
        if task.held is not None:
            self.free = self.ends[number] = max(self.clock, self.free) + task.held
        self._release(number)

    def _done(self, number: int) -> None:
        """It is its turn, and that of what is lazy before it."""
        pending = [number]
        while pending:
            lazy = [a for a in self.tasks[pending[-1]].after if self.tasks[a].lazy and a not in self.placed]
            if lazy:
                pending += lazy
                continue
            last = pending.pop()
            if last not in self.placed:
                self.placed.add(last)
                self.order.append(last)
                self.clock += self.tasks[last].seconds

    def _release(self, number: int) -> None:
        for user in self.users[number]:
            self.missing[user] -= 1
            if not self.missing[user]:
                self._becomes_ready(user)

    def _issue(self, start: int) -> None:
        heapq.heappop(self.ready[self.need[start]])
        self._do(start)
        link = self.tasks[start].link_seconds
        assert link is not None
        self.free = max(self.clock, self.free) + link
        self.ends[start] = self.free

    def _reach(self, k: int, start: int) -> None:
        """Compute all that the k-th collective needs."""
        while self.missing[start]:
            if self.ready.get(k):
                self._do(heapq.heappop(self.ready[k]))
            else:
                self._wait(self.waits[k], k)

    def _wait(self, waits: list[int], k: int) -> None:
        """Wait for what comes first, and do something else until then."""
        number = min(waits, key=lambda w: (self.ends[self._start(w)], w))
        start = self._start(number)
        covered = self.ends[start] + (SLACK - 1) * (self.tasks[start].link_seconds or self.tasks[start].held or 0.0)
        while self.clock < covered:
            filler = self._filler(k, covered - self.clock)
            if filler is None:
                break
            self._do(filler)
        waits.remove(number)
        heapq.heapify(waits)
        self._do(number)

    def _start(self, wait: int) -> int:
        start = self.tasks[wait].start
        assert start is not None
        return start

    def _filler(self, k: int, gap: float) -> int | None:
        """Work that nothing holds up; what the k-th collective needs is done by now."""
        for need in sorted(n for n, heap in self.ready.items() if heap and (k < n <= k + self.reach or n == NEVER)):
            number = self.ready[need][0]
            # a start must come in its turn
            if self.tasks[number].link_seconds is None and self.tasks[number].seconds <= self.coarse * gap:
                return heapq.heappop(self.ready[need])
        return None

    def _catch_up(self, k: int) -> None:
        """Do what was held back for gaps and has waited for long enough, now that a message is on its way."""
        held = self.ready.get(NEVER, [])
        for number in sorted(n for n in held if self.since[n] + self.reach < k):
            held.remove(number)
            heapq.heapify(held)
            self._do(number)
            held = self.ready.get(NEVER, [])

    def _finish(self) -> None:
        """What no collective needs."""
        while self.ready.get(NEVER) or self.waits.get(NEVER):
            if self.ready.get(NEVER):
                self._do(heapq.heappop(self.ready[NEVER]))
            else:
                self._wait(self.waits[NEVER], NEVER)
        for number in in_order(self.tasks):
            if number not in self.placed:  # lazy, and a result
                self._done(number)

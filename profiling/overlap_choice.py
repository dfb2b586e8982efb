"""Which overlap hides the exchange of a layer of experts, and what a stack of such layers then takes.

A layer is attention (with norms and routing), dispatch, routed experts, combine; the shared expert waits for none of these
but attention. A rank does one thing at a time, and one exchange at a time beside it.

- none: all in turn.
- shared expert: it runs while dispatch and combine travel.
- chunked xN: the layer's tokens in N parts; one part's exchange runs beside another's experts, and the shared expert.
- two-batch: the batch in halves through all layers; one half's exchange runs beside whatever the other has to compute.

Parts of a batch take what they take: weights are read for each of them, and each message has its latency.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

CHUNKS = (2, 4)
NONE, SHARED, TWO_BATCH = "none", "shared expert", "two-batch"


@dataclass(frozen=True, slots=True)
class LayerSeconds:
    """Of a layer of experts, or of a part of its tokens."""

    attention: float
    shared: float
    dispatch: float
    routed: float
    combine: float

    @property
    def compute(self) -> float:
        return self.attention + self.shared + self.routed

    def slowed(self, factor: float) -> "LayerSeconds":
        """With computation that takes so many times as long."""
        return replace(
            self, attention=factor * self.attention, shared=factor * self.shared, routed=factor * self.routed
        )

    @property
    def exchange(self) -> float:
        return self.dispatch + self.combine


@dataclass(frozen=True, slots=True)
class _Task:
    on_link: bool
    seconds: float
    after: tuple[int, ...]
    """Places in the list of tasks."""


def plans(
    at: Callable[[float], LayerSeconds], layers: int, *, can_split: bool = True, busy: float = 0.0
) -> dict[str, float]:
    """Seconds of so many layers under each plan; none but the first where nothing travels.

    Args:
        at: of a layer with this fraction of the tokens.
        can_split: whether there are tokens to split.
        busy: share of a device that an exchange beside computation takes from it.
    """
    whole = at(1.0)
    found = {NONE: layers * (whole.compute + whole.exchange)}
    if not whole.exchange:
        return found
    beside = whole.slowed(1 / (1 - busy))
    found[SHARED] = layers * (whole.attention + whole.routed + max(whole.exchange, beside.shared))
    if can_split:
        parts = {n: at(1 / n).slowed(1 / (1 - busy)) for n in CHUNKS}
        found |= {
            f"chunked x{n}": layers * _makespan(_chunked(whole.attention, beside.shared, parts[n], n)) for n in CHUNKS
        }
        found[TWO_BATCH] = _makespan(_two_batch(parts[2], layers))
    return found


def best(seconds: Mapping[str, float]) -> str:
    """The fastest; of equal ones the simplest, which stands first."""
    return min(seconds, key=seconds.__getitem__)


def _chunked(attention: float, shared: float, part: LayerSeconds, chunks: int) -> list[_Task]:
    tasks = [_Task(False, attention, ())]
    tasks += [_Task(True, part.dispatch, (0,)) for _ in range(chunks)]
    tasks.append(_Task(False, shared, (0,)))
    for i in range(chunks):
        tasks.append(_Task(False, part.routed, (1 + i,)))
        tasks.append(_Task(True, part.combine, (len(tasks) - 1,)))
    return tasks


def _two_batch(half: LayerSeconds, layers: int) -> list[_Task]:
    tasks: list[_Task] = []
    ready: list[tuple[int, ...]] = [(), ()]
    for _ in range(layers):
        for h in range(2):
            at = len(tasks)
            tasks += [
                _Task(False, half.attention, ready[h]),
                _Task(True, half.dispatch, (at,)),
                _Task(False, half.shared, (at,)),
                _Task(False, half.routed, (at + 1,)),
                _Task(True, half.combine, (at + 3,)),
            ]
            ready[h] = (at + 2, at + 4)
    return tasks


def _makespan(tasks: Sequence[_Task]) -> float:
    """Of two workers, each of which takes what can start first; of those that could, what comes first in the list."""
    ends: dict[int, float] = {}
    free = {True: 0.0, False: 0.0}
    waiting = list(range(len(tasks)))
    while waiting:
        starts = [
            (max([free[tasks[i].on_link], *(ends[j] for j in tasks[i].after)]), i)
            for i in waiting[:16]  # further ones wait for these
            if all(j in ends for j in tasks[i].after)
        ]
        start, i = min(starts)
        ends[i] = free[tasks[i].on_link] = start + tasks[i].seconds
        waiting.remove(i)
    return max(ends.values(), default=0.0)

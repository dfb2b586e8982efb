"""Which overlap hides the exchange of a layer of experts, and what a stack of such layers then takes.

A layer is attention (with norms and routing), dispatch, routed experts, combine; the shared expert waits for none of these
but attention.

- none: all in turn.
- shared expert: it runs while dispatch and combine travel.
- chunked xN: the layer's tokens in N parts; one part's exchange runs beside another's experts, and the shared expert.
- two-batch: the batch in halves through all layers; one half's exchange runs beside whatever the other has to compute.

The order of each is that of the pass ``overlap_all_to_all``. Parts of a batch take what they take: weights are read for each
of them, and each message has its latency.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from deepfuse.passes.overlap_orders import orders
from deepfuse.passes.overlap_schedule import Task, play

CHUNKS = (2, 4)
NONE, SHARED, TWO_BATCH = "none", "shared expert", "two-batch"
SCHEDULED = 4
"""Layers that are put in order; behind the first of them each takes what the one before took."""

Ops = tuple[float, ...]
"""Seconds of ops, each of which waits for the one before."""


@dataclass(frozen=True, slots=True)
class LayerSeconds:
    """Of a layer of experts, or of a part of its tokens, in one pass.

    In the backward pass ``dispatch`` carries the gradients of results, and ``combine`` those of tokens; the attention is that of the
    layer before.
    """

    attention: Ops
    shared: Ops
    dispatch: float
    routed: Ops
    combine: float

    @property
    def compute(self) -> float:
        return sum(self.attention) + sum(self.shared) + sum(self.routed)

    @property
    def exchange(self) -> float:
        return self.dispatch + self.combine

    def later(self, seconds: float) -> "LayerSeconds":
        """With messages of which each comes so much later."""
        return replace(self, dispatch=self.dispatch + seconds, combine=self.combine + seconds)


def plans(
    at: Callable[[float], LayerSeconds], layers: int, *, can_split: bool = True, busy: float = 0.0, late: float = 0.0
) -> dict[str, float]:
    """Seconds of so many layers under each plan; none but the first where nothing travels.

    Args:
        at: of a layer with this fraction of the tokens.
        can_split: whether there are tokens to split.
        busy: share of a device that an exchange beside computation takes from it.
        late: seconds that a message beside computation takes longer than one that is alone.
    """
    whole = at(1.0)
    found = {NONE: layers * (whole.compute + whole.exchange)}
    if not whole.exchange:
        return found
    beside = whole.later(late)
    found[SHARED] = layers * _fastest(_Tasks().layer(beside, [beside]), busy)
    if can_split:
        parts = {n: at(1 / n).later(late) for n in CHUNKS}
        found |= {f"chunked x{n}": layers * _fastest(_Tasks().layer(beside, [parts[n]] * n), busy) for n in CHUNKS}
        found[TWO_BATCH] = _stack(parts[2], layers, busy)
    return found


def best(seconds: Mapping[str, float]) -> str:
    """The fastest; of equal ones the simplest, which stands first."""
    return min(seconds, key=seconds.__getitem__)


def _stack(half: LayerSeconds, layers: int, busy: float) -> float:
    """Of two halves of a batch."""

    def seconds(depth: int) -> float:
        tasks = _Tasks()
        ends: list[tuple[int, ...]] = [(), ()]
        for _ in range(depth):
            for h in range(2):
                tasks.layer(half, [half], ends[h])
                ends[h] = tasks.ends
        return _fastest(tasks, busy)

    few, more = min(layers, SCHEDULED // 2), min(layers, SCHEDULED)
    first, last = seconds(few), seconds(more)
    return last if more == layers else last + (layers - more) * (last - first) / (more - few)


class _Tasks(list[Task]):
    """Tasks of layers, in an order in which they could run."""

    ends: tuple[int, ...] = ()
    """What the next layer waits for."""

    def layer(self, whole: LayerSeconds, parts: Sequence[LayerSeconds], after: tuple[int, ...] = ()) -> "_Tasks":
        """A layer whose attention and shared expert are those of ``whole``, and whose experts come in parts."""
        routed = self._chain(whole.attention, after)
        ends: list[int] = []
        for part in parts:
            there = self._chain(part.routed, self._message(part.dispatch, routed))
            ends += self._message(part.combine, there)
        self.ends = (*ends, *self._chain(whole.shared, routed))
        return self

    def _chain(self, ops: Ops, after: tuple[int, ...]) -> tuple[int, ...]:
        for seconds in ops:
            self.append(Task(seconds=seconds, after=after))
            after = (len(self) - 1,)
        return after

    def _message(self, seconds: float, after: tuple[int, ...]) -> tuple[int, ...]:
        self.append(Task(link_seconds=seconds, after=after))
        start = len(self) - 1
        self.append(Task(start=start, after=(start,)))
        return (start + 1,)


def _fastest(tasks: Sequence[Task], busy: float) -> float:
    """Seconds of the best order that the pass tries."""
    return min(play(tasks, order, busy=busy).seconds for order in orders(tasks))

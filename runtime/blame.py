"""Who kept the others waiting: what processes said of themselves, and who says nothing any more, into one error."""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Literal


class RankError(RuntimeError):
    """Another process keeps this one from going on.

    Attributes:
        ranks: of the processes to blame; empty where it is the connection between two that live.
        step: which this process was in, ``None`` where steps are not counted.
        phase: of the step.
    """

    def __init__(self, text: str, *, ranks: tuple[int, ...], step: int | None, phase: str):
        super().__init__(text)
        self.ranks, self.step, self.phase = ranks, step, phase


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """What a process says of itself, some twenty times in the timeout.

    Attributes:
        count: of its beats.
        step: the main thread is in, or was in last.
        phase: the main thread is in; ``""`` outside of any.
        seconds: since that phase began.
        long: whether it may take as long as it takes.
        idle: seconds that the main thread has done nothing in it.
        place: line of code that the main thread is at, as far as it is not torch's.
        end: why it goes no further: ``lost`` others in a collective, ``failed`` by itself, ``left`` as programs end.
        reason: the error's text.
        blamed: ranks that it blames for ``lost``; ``None`` until it knows.
    """

    count: int
    step: int | None = None
    phase: str = ""
    seconds: float = 0.0
    long: bool = False
    idle: float = 0.0
    place: str = ""
    end: Literal["", "lost", "failed", "left"] = ""
    reason: str = ""
    blamed: tuple[int, ...] | None = None

    @classmethod
    def read(cls, text: bytes) -> "Beat":
        fields = json.loads(text)
        blamed = fields.pop("blamed")
        return cls(**fields, blamed=None if blamed is None else tuple(blamed))

    def write(self) -> str:
        return json.dumps(asdict(self))

    @property
    def where(self) -> str:
        """``step 17 (dispatch)``, as far as it is known."""
        return where(self.step, self.phase)


def where(step: int | None, phase: str) -> str:
    if step is None:
        return phase or "no step yet"
    return f"step {step}" + (f" ({phase})" if phase else "")


def blame(
    beats: Mapping[int, Beat | None], silent: Collection[int], rank: int, *, store_lost: bool, agent: bool
) -> tuple[tuple[int, ...], str]:
    """Ranks to blame, and why, in words.

    Args:
        beats: the last of each other process; ``None`` of one that was never heard of.
        silent: ranks without a new beat, though there was time for several.
        rank: of this process.
        store_lost: whether the store does not answer.
        agent: whether torchrun's agent hosts the store, rather than rank 0.
    """
    quiet = sorted(r for r in silent if not _ended(beats[r]))
    if store_lost and agent:
        return (), "the store of torchrun's agent cannot be reached: the agent has ended, or the connection is torn"
    if store_lost and rank != 0 and not _ended(beats[0]):
        return (0,), "rank 0, which hosts the store, cannot be reached: it has ended, or the connection is torn"
    if quiet:
        return tuple(quiet), "; ".join(f"rank {r} is silent: {_last(beats[r])}" for r in quiet)
    against = sorted(r for r, beat in beats.items() if beat and beat.blamed and rank in beat.blamed)
    if against:
        return (rank,), f"{ranks(against)} gave up waiting for this one, rank {rank}"
    alive = {r: beat for r, beat in beats.items() if beat is not None}
    own = {r: beat for r, beat in alive.items() if beat.end in ("failed", "left")}
    if own:
        told = (
            f"rank {r} {'failed' if b.end == 'failed' else 'ended'} after {b.where}: {b.reason or 'its program did'}"
            for r, b in own.items()
        )
        return tuple(own), "; ".join(told)
    late = {r: beat for r, beat in alive.items() if not beat.end}
    if late:
        return tuple(late), "; ".join(f"rank {r} {lives(b)}" for r, b in late.items())
    told = (f"rank {r}: {b.reason}" for r, b in alive.items())
    return (), f"all processes live: a connection between them is torn; {'; '.join(told)}"


def lives(beat: Beat) -> str:
    """What can be said of a process that beats, and does not come."""
    return f"lives, but has been in {beat.where} for {beat.seconds:.1f} s, at {beat.place}"


def ranks(some: Collection[int]) -> str:
    """``rank 3``, ``ranks 0-4, 7``."""
    runs: list[list[int]] = []
    for r in sorted(some):
        if runs and r == runs[-1][-1] + 1:
            runs[-1].append(r)
        else:
            runs.append([r])
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"rank{'' if len(some) == 1 else 's'} {', '.join(parts)}"


def _ended(beat: Beat | None) -> bool:
    return beat is not None and beat.end != ""


def _last(beat: Beat | None) -> str:
    return "it never was heard of" if beat is None else f"its last beat was in {beat.where}, at {beat.place}"

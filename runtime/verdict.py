"""All processes tell the first one something through the store; it judges, and all get its verdict.

That is no collective. A process that says it is at something that lasts (:func:`~deepfuse.runtime.heartbeat.watched`:
it compiles, or reads a checkpoint) is waited for as long as it beats and does something, others for a timeout. Who has failed comes to the
meeting that the others come to next, whatever it is for, and all of them raise its error.
"""

import contextlib
import itertools
import json
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from deepfuse.ir.private import default_store
from deepfuse.runtime.blame import RankError, lives, ranks, where
from deepfuse.runtime.heartbeat import fault, last_of, last_step, watched
from deepfuse.runtime.told_once import kind_of, of_kind, settled, told_once

WAITS = 0.75
"""Part of ``timeout_s`` that the first process waits for the others: all have ended when it is over."""
IDLE = 0.6
"""Part of that wait for which one that is at something that lasts may have done nothing; longer, it hangs."""
PATIENCE_S = 3600.0
"""Seconds for what lasts longer on one process than on another: compiling, and files."""
_numbers = itertools.count()


def verdict(what: str, mine: str, judge: Callable[[list[str]], str], timeout_s: float) -> str:
    """What the first process makes of what all of them say; all come here in the same order.

    Args:
        what: the phase (:func:`~deepfuse.runtime.heartbeat.watched`) to wait in.
        mine: what this process says.
        judge: from what they say, by rank.
        timeout_s: how long the others may take, unless they are at something that lasts.

    Raises:
        Exception: the error of a process that has failed instead, in all of them.
        RankError: one did not come, or has died.
    """
    outcome = _met(what, {"what": what, "said": mine}, judge, timeout_s)
    if "failed" in outcome:
        kind, text = outcome["failed"]
        raise told_once(of_kind(kind, text))
    judged: str = outcome["verdict"]
    return judged


def failing(error: Exception, timeout_s: float) -> Exception:
    """What every process raises, now that this one has an error: told at the meeting to which the others come next.

    Where they come to none, it is the error itself.
    """
    kind = kind_of(error)
    try:
        outcome = _met("failure", {"what": "failure", "failed": [kind, str(error)]}, None, timeout_s)
    except RuntimeError:
        return settled(error)
    if outcome["failed"] == [kind, str(error)]:
        return told_once(error)
    kind, text = outcome["failed"]
    return told_once(of_kind(kind, text))


def _met(what: str, mine: dict[str, Any], judge: Callable[[list[str]], str] | None, timeout_s: float) -> dict[str, Any]:
    """``verdict``, or ``failed``: type and text of the error to raise."""
    store = dist.PrefixStore(f"deepfuse/meeting{next(_numbers)}", default_store())
    limit = WAITS * timeout_s
    rank, names = dist.get_rank(), [str(r) for r in range(dist.get_world_size())]
    store.set(str(rank), json.dumps(mine))
    # who waits here is not the one to blame
    with watched(what, long=True):
        if rank == 0:
            lacking = missing(store, names, limit)
            said = [] if lacking else [json.loads(text) for text in store.multi_get(names)]
            why = "; ".join(f"rank {name} {_of(int(name))}" for name in lacking)
            outcome = {"lacking": [int(name) for name in lacking], "why": why} if lacking else _outcome(said, judge)
            store.set("verdict", json.dumps(outcome))
        elif missing(store, ["verdict"], 1.2 * limit):
            raise _absent((0,), f"rank 0 {_of(0)}", what, limit)
        outcome = json.loads(store.get("verdict"))
    if rank != 0:
        store.set(f"{rank} knows", "")
    elif "lacking" not in outcome:
        # the store may be this process's, which the verdict may end, as it may have ended others already
        with contextlib.suppress(dist.DistStoreError):
            missing(store, [f"{name} knows" for name in names[1:]], limit)
    if "lacking" in outcome:
        raise _absent(tuple(outcome["lacking"]), outcome["why"], what, limit)
    return outcome


def _absent(who: tuple[int, ...], why: str, what: str, limit: float) -> RankError:
    step = last_step()
    text = f"{where(step, what)}: want all processes within {limit:g} s, got: {why}; see what {ranks(who)} printed"
    return RankError(text, ranks=who, step=step, phase=what)


def _outcome(said: list[dict[str, Any]], judge: Callable[[list[str]], str] | None) -> dict[str, Any]:
    if any("failed" in each for each in said):
        return {"failed": _first_failure([each.get("failed") for each in said])}
    points: dict[str, list[int]] = {}
    for rank, each in enumerate(said):
        points.setdefault(each["what"], []).append(rank)
    if len(points) > 1:
        places = "; ".join(f"{what} in {ranks(having)}" for what, having in points.items())
        return {"failed": ["RuntimeError", f"processes: want the same calls in every process, got {places}"]}
    assert judge is not None
    return {"verdict": judge([each["said"] for each in said])}


def _first_failure(failed: list[list[str] | None]) -> list[str]:
    """Type and text of the error to raise: that of all where it is the same, else with the ranks."""
    told = {rank: tuple(each) for rank, each in enumerate(failed) if each is not None}
    kind, text = next(iter(told.values()))
    if len(told) == len(failed) and len(set(told.values())) == 1:
        return [kind, text]
    by_text: dict[str, list[int]] = {}
    for rank, (_, each) in told.items():
        by_text.setdefault(each, []).append(rank)
    return [kind, "; ".join(f"{ranks(having)}: {each}" for each, having in by_text.items())]


def missing(store: dist.Store, names: list[str], timeout_s: float) -> list[str]:
    """Names, beginning with the rank that sets them, that are not in the store in that time; ``verdict`` is of rank 0.

    Raises:
        DistStoreError: a process is known to be lost, so that they may never be.
    """
    began, pause = time.monotonic(), 1e-3
    # asked again and again, one name at a time: a wait in the store locks it, and says not what it lacks
    while True:
        while names and store.check(names[:1]):
            names = names[1:]
        if not names:
            return []
        if fault():
            raise dist.DistStoreError(f"waits for {names[0]} in vain")
        waited = time.monotonic() - began
        if waited > (PATIENCE_S if _lasts(names[0], timeout_s) else timeout_s):
            return [name for name in names if not store.check([name])]
        time.sleep(pause)
        pause = min(2 * pause, 0.05)


def _lasts(name: str, timeout_s: float) -> bool:
    beat = last_of(0 if name == "verdict" else int(name.split()[0]))
    return beat is not None and beat.long and beat.idle <= IDLE * timeout_s


def _of(rank: int) -> str:
    beat = last_of(rank)
    return "was not heard of" if beat is None else lives(beat)

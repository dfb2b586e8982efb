"""All processes tell the first one something through the store; it judges, and all get its verdict.

That is no collective: it waits as long as it is told to, for processes that compile or read a checkpoint, and knows
through their beats when one has died.
"""

import contextlib
import itertools
import json
import time
from collections.abc import Callable

import torch.distributed as dist

from deepfuse.ir.private import default_store
from deepfuse.runtime.blame import ranks
from deepfuse.runtime.heartbeat import fault, watched

_numbers = itertools.count()


def verdict(what: str, mine: str, judge: Callable[[list[str]], str], timeout_s: float) -> str:
    """What the first process makes of what all of them say; all come here in the same order.

    Args:
        what: the phase (:func:`~deepfuse.runtime.heartbeat.watched`) to wait in.
        mine: what this process says.
        judge: from what they say, by rank.
        timeout_s: how long the others may take.

    Raises:
        RuntimeError: some did not come.
        RankError: one has died.
    """
    store = dist.PrefixStore(f"deepfuse/{what}{next(_numbers)}", default_store())
    rank, names = dist.get_rank(), [str(r) for r in range(dist.get_world_size())]
    store.set(str(rank), mine)
    with watched(what):
        if rank == 0:
            lacking = missing(store, names, timeout_s)
            judged = None if lacking else judge([text.decode() for text in store.multi_get(names)])
            store.set("verdict", json.dumps([lacking, judged]))
        elif missing(store, ["verdict"], 1.25 * timeout_s):
            raise RuntimeError(f"{what}: want a verdict of rank 0 within {timeout_s:g} s, got none")
        lacking, judged = json.loads(store.get("verdict"))
    if rank != 0:
        store.set(f"{rank} knows", "")
    elif not lacking:
        # the store may be this process's, which the verdict may end, as it may have ended others already
        with contextlib.suppress(dist.DistStoreError):
            missing(store, [f"{name} knows" for name in names[1:]], timeout_s)
    if lacking:
        raise RuntimeError(
            f"{what}: want every process within {timeout_s:g} s, got nothing of {ranks(list(map(int, lacking)))}"
        )
    return judged


def missing(store: dist.Store, names: list[str], timeout_s: float) -> list[str]:
    """Names that are not in the store in that time.

    Raises:
        DistStoreError: a process is known to be lost, so that they may never be.
    """
    end, pause = time.monotonic() + timeout_s, 1e-3
    # asked again and again, one name at a time: a wait in the store locks it, and says not what it lacks
    while time.monotonic() < end:
        while names and store.check(names[:1]):
            names = names[1:]
        if not names:
            return []
        if fault():
            raise dist.DistStoreError(f"waits for {names[0]} in vain")
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
    return [name for name in names if not store.check([name])]

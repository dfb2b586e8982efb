"""Processes wait for one another outside of the model's collectives, whose waits are short.

Compiling takes as long as it takes, and on one process longer than on another.
"""

import itertools
import time

from deepfuse.ir.private import default_store
from deepfuse.runtime.axes import Axes
from deepfuse.runtime.heartbeat import watched

_NUMBERS = itertools.count()


def any_of(said: bool, axes: Axes, patience_s: float) -> bool:
    """Wait for all processes of the mesh; whether any of them said yes.

    Args:
        said: what this one says.
        axes: of the mesh.
        patience_s: how long the others may take; that one of them has died is known sooner.

    Raises:
        RuntimeError: some did not come.
    """
    if axes.size == 1:
        return said
    store, place = default_store(), f"deepfuse/meeting/{next(_NUMBERS)}"
    store.set(f"{place}/{axes.rank}", str(int(said)))
    missing = list(range(axes.size))
    end = time.monotonic() + patience_s
    with watched("waiting for the others' graphs"):
        while missing and time.monotonic() < end:
            if store.check([f"{place}/{missing[0]}"]):
                missing.pop(0)
            else:
                time.sleep(0.01)
        if missing:
            raise RuntimeError(f"mesh: want all processes within {patience_s:g} s, got none of ranks {missing}")
        return any(store.get(f"{place}/{rank}") == b"1" for rank in range(axes.size))

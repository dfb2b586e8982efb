"""Processes wait for one another outside of the model's collectives, which wait for a minute only.

Compiling takes as long as it takes, and on one process longer than on another.
"""

import itertools
import time
from collections.abc import Callable

from deepfuse.ir.private import default_store
from deepfuse.runtime.axes import Axes

PATIENCE_S = 3600.0
_NUMBERS = itertools.count()


def any_of(said: bool, axes: Axes, *, patience_s: float = PATIENCE_S, alive: Callable[[], None] = lambda: None) -> bool:
    """Wait for all processes of the mesh; whether any of them said yes.

    Args:
        said: what this one says.
        axes: of the mesh.
        patience_s: how long the others may take.
        alive: called while waiting; raises where one of them is known to have gone.

    Raises:
        TimeoutError: some did not come.
    """
    if axes.size == 1:
        return said
    store, place = default_store(), f"deepfuse/meeting/{next(_NUMBERS)}"
    store.set(f"{place}/{axes.rank}", str(int(said)))
    keys = [f"{place}/{rank}" for rank in range(axes.size)]
    began = time.monotonic()
    while not store.check(keys):
        alive()
        if time.monotonic() - began > patience_s:
            missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
            raise TimeoutError(f"mesh: want all processes within {patience_s:g} s, got none from ranks {missing}")
        time.sleep(0.02)
    return any(store.get(key) == b"1" for key in keys)

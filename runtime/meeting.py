"""Processes wait for one another outside of the model's collectives, whose waits are short.

Compiling takes as long as it takes, and on one process longer than on another.
"""

from deepfuse.runtime.axes import Axes
from deepfuse.runtime.heartbeat import alone
from deepfuse.runtime.verdict import verdict


def any_of(said: bool, axes: Axes, timeout_s: float) -> bool:
    """Wait for all processes of the mesh; whether any of them said yes.

    Args:
        said: what this one says.
        axes: of the mesh.
        timeout_s: how long the others may take, unless they are at something that lasts.

    Raises:
        RankError: one did not come, or has died.
    """
    if axes.size == 1 or alone():
        return said
    told = verdict("waiting for the others' graphs", "yes" if said else "", lambda all_say: "".join(all_say), timeout_s)
    return told != ""

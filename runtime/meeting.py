"""Processes wait for one another outside of the model's collectives, whose waits are short.

Compiling takes as long as it takes, and on one process longer than on another.
"""

from deepfuse.runtime.axes import Axes
from deepfuse.runtime.verdict import verdict


def any_of(said: bool, axes: Axes, patience_s: float) -> bool:
    """Wait for all processes of the mesh; whether any of them said yes.

    Args:
        said: what this one says.
        axes: of the mesh.
        patience_s: how long the others may take; that one of them has died is known sooner.

    Raises:
        RuntimeError: some did not come, or have died.
    """
    if axes.size == 1:
        return said
    told = verdict(
        "waiting for the others' graphs", "yes" if said else "", lambda all_say: "".join(all_say), patience_s
    )
    return told != ""

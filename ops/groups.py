"""The rows of each group, on the host.

group e owns rows offsets[e-1] .. offsets[e]
"""

from collections.abc import Iterator

from torch import Tensor


def groups(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """Number and rows of each group that has rows."""
    begin = 0
    for e, end in enumerate(offsets.tolist()):
        if end > begin:
            yield e, slice(begin, end)
        begin = end

"""How a tensor of one process is cut out of the whole model's."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deepfuse.blocks.axis import Axis


class Cut(NamedTuple):
    """A dimension, dealt out to the processes of an axis: in order, or by slots."""

    axis: Axis
    dim: int
    stretches: int = 1
    """Equal parts of the dimension that are each dealt out by themselves: 2 where gate and up are one tensor."""
    slots: tuple[int, ...] = ()
    """Where slots are dealt out in order, and not the dimension itself: which index is in each; every index in some."""

    def indices(self, total: int, what: str) -> Sequence[int]:
        """Which of ``total`` this process has, in its order; an index that is in two of its slots twice."""
        own = self.axis.share(len(self.slots) or total, what)
        return self.slots[own] if self.slots else range(own.start, own.stop)

    def holder(self, index: int, total: int) -> int:
        """The first process of the axis that has one of ``total``."""
        place = self.slots.index(index) if self.slots else index
        return place // ((len(self.slots) or total) // self.axis.size)


def taken(x: Tensor, cuts: Iterable[Cut]) -> Tensor:
    """This process's part of the whole ``x``; a view where it can be one."""
    for cut in cuts:
        what = f"dimension {cut.dim} of {list(x.shape)}"
        if cut.slots:
            own = cut.indices(x.shape[cut.dim], what)
            x = x.index_select(cut.dim, torch.tensor(own, device=x.device))
            continue
        parts = x.unflatten(cut.dim, (cut.stretches, -1))
        mine = cut.axis.share(parts.shape[cut.dim + 1], what)
        x = parts.narrow(cut.dim + 1, mine.start, mine.stop - mine.start).flatten(cut.dim, cut.dim + 1)
    return x


def whole_shape(shape: Iterable[int], cuts: Iterable[Cut]) -> torch.Size:
    """Shape of the whole tensor, from that of one process's part."""
    out = list(shape)
    for cut in cuts:
        out[cut.dim] = max(cut.slots) + 1 if cut.slots else out[cut.dim] * cut.axis.size
    return torch.Size(out)

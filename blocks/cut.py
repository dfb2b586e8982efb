"""How a tensor of one process is cut out of the whole model's."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from deepfuse.blocks.axis import Axis


class Cut(NamedTuple):
    """A dimension, dealt out in order to the processes of an axis."""

    axis: Axis
    dim: int
    stretches: int = 1
    """Equal parts of the dimension that are each dealt out by themselves: 2 where gate and up are one tensor."""


def taken(x: Tensor, cuts: Iterable[Cut]) -> Tensor:
    """This process's part of the whole ``x``; a view where it can be one."""
    for axis, dim, stretches in cuts:
        parts = x.unflatten(dim, (stretches, -1))
        mine = axis.share(parts.shape[dim + 1], f"dimension {dim} of {list(x.shape)}")
        x = parts.narrow(dim + 1, mine.start, mine.stop - mine.start).flatten(dim, dim + 1)
    return x


def whole_shape(shape: Iterable[int], cuts: Iterable[Cut]) -> torch.Size:
    """Shape of the whole tensor, from that of one process's part."""
    cuts, out = list(cuts), list(shape)
    for dim in range(len(out)):
        out[dim] *= math.prod(cut.axis.size for cut in cuts if cut.dim == dim)
    return torch.Size(out)

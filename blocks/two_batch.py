"""A batch in two halves of whole sequences, which go through the layers by turns.

    layer 0 of the first half, layer 0 of the second, layer 1 of the first, ...

Halves do not read each other, so that ``overlap_all_to_all`` may run one half's attention, or its experts, under the other
half's all-to-all. The price: products have half of the rows, and weights are read twice. Both halves write the same latent
caches, each its own rows.
Numerics: a token's own are the same; gradients of weights are summed half by half.
Dims: T tokens, B sequences.
Source: two micro-batches, DeepSeek-V3 (arXiv:2412.19437), section 3.4.1.
"""

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from deepfuse.blocks.batch import Batch


def parts_of(batch: Batch, first_half: int | None, second_start: Tensor | None = None) -> list[Batch]:
    """The first ``(B + 1) // 2`` sequences and the others, which are none where B is 1; or halves of any sequences.

    Args:
        first_half: tokens of the first, padding among them; ``None`` leaves the batch whole.
        second_start: ``[B2 + 1]`` int32, ``q_start`` of the second half by itself; the batch's is then the first half's.
            ``None``: the batch's is that of all, and there is no padding between the halves.
    """
    if first_half is None:
        return [batch]
    tokens = first_half, batch.positions.shape[0] - first_half
    q_start = batch.q_start
    if second_start is None:
        B = q_start.shape[0] - 1
        # where the first half ends, the second begins
        q_start, second_start = q_start.narrow(0, 0, (B + 1) // 2 + 1), q_start.narrow(0, (B + 1) // 2, B // 2 + 1)
        second_start = second_start - first_half
    q_starts = q_start, second_start
    sequences = q_start.shape[0] - 1, second_start.shape[0] - 1
    parts = []
    for i in range(2):
        positions, cos, sin, slots = (
            None if x is None else x.split(tokens)[i] for x in (batch.positions, batch.cos, batch.sin, batch.slots)
        )
        block_table, seqlens = (
            None if x is None else x.split(sequences)[i] for x in (batch.block_table, batch.seqlens)
        )
        assert positions is not None and cos is not None and sin is not None
        parts.append(Batch(positions, q_starts[i], cos, sin, slots, block_table, seqlens))
    return parts


def split(x: Tensor, parts: Sequence[Batch]) -> Sequence[Tensor]:
    """``x [T, ...]``, the tokens of each part."""
    return [x] if len(parts) == 1 else x.split([part.positions.shape[0] for part in parts])


def joined(parts: Sequence[Tensor]) -> Tensor:
    """``[T, ...]``, the tokens of all parts."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def weights_once(parts: Sequence[Batch]) -> contextlib.AbstractContextManager[None]:
    """A block in which what makes a weight, as a gather over processes, runs once for all parts; so does its gradient."""
    return contextlib.nullcontext() if len(parts) == 1 else parametrize.cached()

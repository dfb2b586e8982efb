"""What a forward call is about, besides the tokens: which sequences they belong to and where their cache lies.

Tokens of all sequences stand one after the other; what is behind them, or of a sequence without tokens, is padding.
Dims: T tokens, B sequences, P pages a sequence.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """Index tensors of one call, the same for all layers."""

    positions: Tensor
    """``[T]`` int64, place of each token in its sequence."""
    q_start: Tensor
    """``[B + 1]`` int32, first token of each sequence, and the end of the last."""
    cos: Tensor
    """``[T, R/2]`` float32, rotary tables of the positions."""
    sin: Tensor
    slots: Tensor | None = None
    """``[T]`` int64, where the latents go in the cache; ``None`` keeps none (training)."""
    block_table: Tensor | None = None
    """``[B, P]`` int64, pages of each sequence; given in decode, where keys come from the cache."""
    seqlens: Tensor | None = None
    """``[B]`` int32, tokens of each sequence, the new one included; given in decode, where 0 is padding."""

    def tokens(self) -> Tensor:
        """``[T]`` bool: what is no padding."""
        if self.seqlens is not None:
            return self.seqlens > 0
        return torch.arange(self.positions.shape[0], device=self.positions.device) < self.q_start[-1]

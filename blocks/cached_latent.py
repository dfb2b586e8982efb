"""The latent cache as attention sees it, in whichever format it has: numbers, or the bytes of FP8.

Dims: T tokens, S cached tokens (padded), P pages, C latent rank, R rotary width.
"""

import torch
from torch import Tensor

from deepfuse.ops.append_latent import append_latent
from deepfuse.ops.append_latent_fp8 import append_latent_fp8, is_in_fp8
from deepfuse.ops.gather_latent import gather_latent
from deepfuse.ops.gather_latent_fp8 import gather_latent_fp8


def append(cache: Tensor, latent: Tensor, k_rope: Tensor, slots: Tensor) -> None:
    """Write ``latent [T, C]`` and ``k_rope [T, R]`` at ``slots [T]``; ``cache`` is changed."""
    op = append_latent_fp8 if is_in_fp8(cache) else append_latent
    op(cache, latent, k_rope, slots)


def gather(cache: Tensor, block_table: Tensor, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows ``[S, C + R]`` of the pages of ``block_table [B, P]``, and the first row of each sequence ``[B]``.

    ``rank`` is C, and ``dtype`` that of the rows.
    """
    if is_in_fp8(cache):
        return gather_latent_fp8(cache, block_table, rank, dtype)
    return gather_latent(cache, block_table)

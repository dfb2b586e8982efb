"""How Hopper's tensor cores add up products of FP8, emulated: sums of about 14 bits, promoted to float32 or not.

One instruction sums 32 products and what was accumulated before: all terms are aligned to the largest exponent among
them, cut off (not rounded) 13 bits below it, and added exactly. What falls off is lost, so the error grows with the
length of a sum, unless it is promoted: taken out into float32 every so often, and begun at zero again.

This is a model, good for the size of the error and its growth, not for single bits.
Source: DeepSeek-V3 (arXiv:2412.19437), section 3.3.2 and appendix B (14 bits; promotion every 128).
"""

import torch
from torch import Tensor

INSTRUCTION_K = 32
"""Products of FP8 that one instruction sums."""
FRACTION_BITS = 13
"""Bits behind the leading one that survive alignment."""


def accumulate_fp8(a: Tensor, b: Tensor, promote_every: int | None, *, fraction_bits: int = FRACTION_BITS) -> Tensor:
    """``a @ b.T`` as a tensor core sums it.

    Args:
        a: ``[M, K]``, values that FP8 holds, any dtype.
        b: ``[N, K]``, likewise.
        promote_every: elements of K, a multiple of 32, after which the sum is added to one in float32; ``None``: never.
        fraction_bits: kept behind the leading bit of the largest term.

    Returns:
        ``[M, N]``, float32.

    Raises:
        ValueError: shapes do not fit, or ``promote_every`` is no multiple of 32.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"accumulate_fp8: want a [M, K] and b [N, K], got {list(a.shape)} and {list(b.shape)}")
    if promote_every is not None and (promote_every <= 0 or promote_every % INSTRUCTION_K):
        raise ValueError(f"accumulate_fp8: want promote_every a multiple of {INSTRUCTION_K}, got {promote_every}")
    # products of FP8 have 8 bits and are exact in float64, as are sums of what is left of them
    a_MK, b_NK = a.double(), b.double()
    total_MN = torch.zeros(a.shape[0], b.shape[0], device=a.device)
    sum_MN = total_MN.double()
    for k in range(0, a.shape[1], INSTRUCTION_K):
        if promote_every is not None and k % promote_every == 0:
            total_MN, sum_MN = total_MN + sum_MN.float(), torch.zeros_like(sum_MN)
        products_MNK = a_MK[:, None, k : k + INSTRUCTION_K] * b_NK[None, :, k : k + INSTRUCTION_K]
        sum_MN = _aligned_sum(torch.cat([sum_MN[..., None], products_MNK], -1), fraction_bits)
    return total_MN + sum_MN.float()


def _aligned_sum(terms: Tensor, fraction_bits: int) -> Tensor:
    """Sum over the last dimension of terms cut off below the leading bit of the largest."""
    _, exponent = torch.frexp(terms.abs().amax(-1, keepdim=True))
    # frexp gives a fraction below one: the leading bit is worth 2**(exponent - 1)
    unit = torch.exp2((exponent - 1 - fraction_bits).double())
    return (torch.trunc(terms / unit) * unit).sum(-1)

"""Absorbed latent attention of one new token per sequence over the paged latent cache in FP8.

    c[s], r[s] = dequantize(cached row of token s);   out = mla_decode over [c | r]

What it saves: a row of DeepSeek-V3 is 656 bytes, not 1152. Queries, weights and products stay in the dtype of the
queries: attention is among what DeepSeek-V3 keeps in high precision.
Dims: B sequences, H heads, C latent rank, R rotary width, P pages a sequence, W bytes of a row, S = P * 64 tokens.
Source: DeepSeek-V2 (arXiv:2405.04434), section 2.1.2; rows as in ``append_latent_fp8``.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from deepfuse.ir.cost import Cost, tensor_bytes
from deepfuse.ir.op import define
from deepfuse.ops.append_latent import PAGE_SIZE
from deepfuse.ops.append_latent_fp8 import check_row, packed_rows, unpacked_rows
from deepfuse.ops.mla_decode import mla_decode_ref, stream_pages
from deepfuse.ops.mla_decode_splits import mixed_attention, splits_fit


def mla_decode_fp8_ref(
    q_latent: Tensor, q_rope: Tensor, cache: Tensor, block_table: Tensor, seqlens: Tensor, scale: float
) -> Tensor:
    B, P = block_table.shape
    pages = torch.cat(unpacked_rows(cache[block_table].flatten(0, 1), q_latent.shape[2], q_latent.dtype), -1)
    # the pages lie in the order of the table now
    table = torch.arange(B * P, device=cache.device).view(B, P)
    return mla_decode_ref(q_latent, q_rope, pages, table, seqlens, scale)


def _stream(
    q_latent: Tensor, q_rope: Tensor, cache: Tensor, block_table: Tensor, seqlens: Tensor, scale: float
) -> Tensor:
    rows = unpacked_rows(cache[block_table], q_latent.shape[2], q_latent.dtype)
    return stream_pages(q_latent, q_rope, torch.cat(rows, -1), seqlens, scale)


def _check(q_latent: Tensor, q_rope: Tensor, cache: Tensor, block_table: Tensor, seqlens: Tensor, scale: float) -> None:
    if (
        q_latent.ndim != 3
        or q_rope.ndim != 3
        or cache.ndim != 3
        or q_latent.shape[:2] != q_rope.shape[:2]
        or cache.shape[1] != PAGE_SIZE
        or block_table.ndim != 2
        or block_table.shape[0] != q_latent.shape[0]
        or seqlens.shape != q_latent.shape[:1]
    ):
        raise ValueError(
            f"mla_decode_fp8: want q_latent [B, H, C], q_rope [B, H, R], cache [pages, {PAGE_SIZE}, W], block_table "
            f"[B, P] and seqlens [B], got {[list(t.shape) for t in (q_latent, q_rope, cache, block_table, seqlens)]}"
        )
    check_row("mla_decode_fp8", cache, q_latent.shape[2], q_rope.shape[2])
    if q_latent.dtype != q_rope.dtype:
        raise TypeError(
            f"mla_decode_fp8: want q_latent and q_rope of one dtype, got {q_latent.dtype} and {q_rope.dtype}"
        )


def _fake(
    q_latent: Tensor, q_rope: Tensor, cache: Tensor, block_table: Tensor, seqlens: Tensor, scale: float
) -> Tensor:
    return q_latent.new_empty(q_latent.shape)


def _cost(q_latent: Tensor, q_rope: Tensor, cache: Tensor, block_table: Tensor, seqlens: Tensor, scale: float) -> Cost:
    # lengths are values, which a cost may not read: every page of the table counts as full
    (B, H, C), R = q_latent.shape, q_rope.shape[2]
    S = block_table.shape[1] * PAGE_SIZE
    rows = B * S * cache.shape[2]
    return Cost(
        flops=2 * B * H * S * (2 * C + R) + B * S * C, bytes=rows + 2 * tensor_bytes(q_latent) + tensor_bytes(q_rope)
    )


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for seqlens, P, H, C, R in [
        ([1], 1, 2, 16, 8),
        ([64, 65, 130], 3, 3, 160, 16),  # a full page; a page and a token; uneven; two blocks, the second partial
        ([0, 5], 1, 1, 16, 4),  # a padding row
        ([700], 12, 16, 64, 16),  # longer than one split
    ]:
        B = len(seqlens)
        num_rows = (B * P + 1) * PAGE_SIZE
        rows = packed_rows(torch.randn(num_rows, C, device=device), torch.randn(num_rows, R, device=device))
        yield (
            torch.randn(B, H, C, device=device, dtype=dtype),
            torch.randn(B, H, R, device=device, dtype=dtype),
            rows.unflatten(0, (-1, PAGE_SIZE)),
            torch.randperm(B * P, device=device).reshape(B, P) + 1,
            torch.tensor(seqlens, device=device, dtype=torch.int32),
            (C + R) ** -0.5,
        )


mla_decode_fp8 = define(
    "mla_decode_fp8(Tensor q_latent, Tensor q_rope, Tensor cache, Tensor block_table, Tensor seqlens, float scale)"
    " -> Tensor",
    reference=mla_decode_fp8_ref,
    check=_check,
    fake=_fake,
    cost=_cost,
    samples=_samples,
)
"""One decode step of absorbed attention over a cache in FP8.

Args:
    q_latent: ``[B, H, C]``: the nope part of the query through ``W^UK``; C is a multiple of 4.
    q_rope: ``[B, H, R]``, rotated; R is a multiple of 2.
    cache: ``[pages, 64, W]`` uint8, as ``append_latent_fp8`` writes it; holds the new token too.
    block_table: ``[B, P]`` int64, the pages of each sequence; entries past its length are not read for the result,
        but must be pages.
    seqlens: ``[B]`` int32, tokens of each sequence, the new one included; 0 for a padding row (whose output is 0).
    scale: of the scores (YaRN's mscale included).

Returns:
    ``[B, H, C]``: the mix of latents, still to go through ``W^UV``; dtype of ``q_latent``, to which rows are rounded.

Raises:
    ValueError: shapes do not fit.
    TypeError: the queries' dtypes differ, or ``cache`` is not uint8.
"""

mla_decode_fp8.provide("triton", mixed_attention, priority={"cuda": 10}, supports=splits_fit)
mla_decode_fp8.provide("stream", _stream, priority={"cpu": 10}, inline=True)

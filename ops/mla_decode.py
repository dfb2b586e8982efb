"""Absorbed latent attention of one new token per sequence over the paged latent cache.

    scores[h, s] = (q_latent[h] . c[s] + q_rope[h] . r[s]) * scale      [c | r] = the cached row of token s
    out[h] = sum_s softmax(scores[h])[s] c[s]

Keys and values of all heads are one row of C + R numbers: the step reads the cache once, whatever the heads.
Dims: B sequences, H heads, C latent rank, R rotary width, P pages a sequence, S = P * 64 tokens (padded).
Source: DeepSeek-V2 (arXiv:2405.04434), section 2.1.2, absorption of W^UK and W^UV.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from deepfuse.ir.cost import Cost, tensor_bytes
from deepfuse.ir.op import define
from deepfuse.ir.private import materialize
from deepfuse.ops.append_latent import PAGE_SIZE
from deepfuse.ops.mla_decode_splits import mixed_attention, splits_fit


def mla_decode_ref(
    q_latent: Tensor, q_rope: Tensor, cache: Tensor, block_table: Tensor, seqlens: Tensor, scale: float
) -> Tensor:
    compute = torch.promote_types(q_latent.dtype, torch.float32)
    C = q_latent.shape[-1]
    rows_BSD = cache[block_table].flatten(1, 2).to(compute)
    place_S = torch.arange(rows_BSD.shape[1], device=cache.device)
    past_B1S = place_S >= seqlens[:, None, None]
    # rows past the length may hold anything: a weight of zero times NaN is NaN
    rows_BSD = torch.where(past_B1S.transpose(1, 2), 0.0, rows_BSD)
    q_BHD = torch.cat((q_latent, q_rope), -1).to(compute)
    scores_BHS = (q_BHD @ rows_BSD.transpose(1, 2) * scale).masked_fill(past_B1S, float("-inf"))
    # a sequence without tokens (a padding row of the batch) gives zeros, not NaN
    p_BHS = torch.where(seqlens[:, None, None] > 0, scores_BHS.softmax(-1), 0.0)
    return (p_BHS @ rows_BSD[..., :C]).to(q_latent.dtype)


def _stream(
    q_latent: Tensor, q_rope: Tensor, cache: Tensor, block_table: Tensor, seqlens: Tensor, scale: float
) -> Tensor:
    return stream_pages(q_latent, q_rope, cache[block_table], seqlens, scale)


def stream_pages(q_latent: Tensor, q_rope: Tensor, rows: Tensor, seqlens: Tensor, scale: float) -> Tensor:
    """Reductions over the pages where they lie, which Inductor fuses: no gathered copy, and any number of pages.

    Page by page, so that all heads read a page while it is in the first cache, and threads share the pages. ``rows`` are
    ``[B, P, 64, C + R]``.
    """
    compute = torch.promote_types(q_latent.dtype, torch.float32)
    C, P = q_latent.shape[-1], rows.shape[1]
    rows_BPSD = rows.to(compute)
    place_PS = torch.arange(P, device=rows.device)[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE, device=rows.device)
    written_BPS = place_PS < seqlens[:, None, None]
    q_BHD = materialize(torch.cat((q_latent, q_rope), -1).to(compute) * scale)
    scores_BPHS = (q_BHD[:, None, :, None] * rows_BPSD[:, :, None]).sum(-1)
    scores_BPHS = torch.where(written_BPS[:, :, None], scores_BPHS, float("-inf"))
    # a padding row has no score: its maximum is -inf and its sum 0, and neither may make a NaN
    top_B1H1 = scores_BPHS.amax((1, 3), keepdim=True).clamp(min=torch.finfo(compute).min)
    p_BPHS = (scores_BPHS - top_B1H1).exp()
    total_BH1 = p_BPHS.sum((1, 3))[..., None].clamp(min=torch.finfo(compute).tiny)
    values_BPSC = torch.where(written_BPS[..., None], rows_BPSD[..., :C], 0.0)
    pages_BPHC = (p_BPHS[..., None] * values_BPSC[:, :, None]).sum(3)
    return (pages_BPHC.sum(1) / total_BH1).to(q_latent.dtype)


def _check(q_latent: Tensor, q_rope: Tensor, cache: Tensor, block_table: Tensor, seqlens: Tensor, scale: float) -> None:
    if (
        q_latent.ndim != 3
        or q_rope.ndim != 3
        or cache.ndim != 3
        or q_latent.shape[:2] != q_rope.shape[:2]
        or cache.shape[1] != PAGE_SIZE
        or q_latent.shape[2] + q_rope.shape[2] != cache.shape[2]
        or block_table.ndim != 2
        or block_table.shape[0] != q_latent.shape[0]
        or seqlens.shape != q_latent.shape[:1]
    ):
        raise ValueError(
            f"mla_decode: want q_latent [B, H, C], q_rope [B, H, R], cache [pages, {PAGE_SIZE}, C + R], block_table "
            f"[B, P] and seqlens [B], got {[list(t.shape) for t in (q_latent, q_rope, cache, block_table, seqlens)]}"
        )
    if not q_latent.dtype == q_rope.dtype == cache.dtype:
        raise TypeError(
            "mla_decode: want q_latent, q_rope and cache of one dtype, got "
            f"{q_latent.dtype}, {q_rope.dtype} and {cache.dtype}"
        )


def _fake(
    q_latent: Tensor, q_rope: Tensor, cache: Tensor, block_table: Tensor, seqlens: Tensor, scale: float
) -> Tensor:
    return q_latent.new_empty(q_latent.shape)


def _cost(q_latent: Tensor, q_rope: Tensor, cache: Tensor, block_table: Tensor, seqlens: Tensor, scale: float) -> Cost:
    # lengths are values, which a cost may not read: every page of the table counts as full
    B, H, C = q_latent.shape
    S, D = block_table.shape[1] * PAGE_SIZE, cache.shape[2]
    rows = B * S * D * cache.element_size()
    return Cost(flops=2 * B * H * S * (D + C), bytes=rows + 2 * tensor_bytes(q_latent) + tensor_bytes(q_rope))


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for seqlens, P, H, C, R in [
        ([1], 1, 2, 16, 8),
        ([64, 65, 130], 3, 3, 32, 16),  # a full page; a page and a token; uneven
        ([0, 5], 1, 1, 16, 4),  # a padding row
        ([700], 12, 16, 64, 16),  # longer than one split
    ]:
        B = len(seqlens)
        pages = torch.randperm(B * P, device=device).reshape(B, P) + 1
        yield (
            torch.randn(B, H, C, device=device, dtype=dtype),
            torch.randn(B, H, R, device=device, dtype=dtype),
            torch.randn(B * P + 1, PAGE_SIZE, C + R, device=device, dtype=dtype),
            pages,
            torch.tensor(seqlens, device=device, dtype=torch.int32),
            (C + R) ** -0.5,
        )


mla_decode = define(
    "mla_decode(Tensor q_latent, Tensor q_rope, Tensor cache, Tensor block_table, Tensor seqlens, float scale)"
    " -> Tensor",
    reference=mla_decode_ref,
    check=_check,
    fake=_fake,
    cost=_cost,
    samples=_samples,
)
"""One decode step of absorbed attention.

Args:
    q_latent: ``[B, H, C]``: the nope part of the query through ``W^UK``.
    q_rope: ``[B, H, R]``, rotated.
    cache: ``[pages, 64, C + R]``; holds the new token too.
    block_table: ``[B, P]`` int64, the pages of each sequence; entries past its length are not read for the result,
        but must be pages.
    seqlens: ``[B]`` int32, tokens of each sequence, the new one included; 0 for a padding row (whose output is 0).
    scale: of the scores (YaRN's mscale included).

Returns:
    ``[B, H, C]``: the mix of latents, still to go through ``W^UV``; dtype of ``q_latent``.

Raises:
    ValueError: shapes do not fit.
    TypeError: dtypes differ.
"""

mla_decode.provide("triton", mixed_attention, priority={"cuda": 10}, supports=splits_fit)
mla_decode.provide("stream", _stream, priority={"cpu": 10}, inline=True)

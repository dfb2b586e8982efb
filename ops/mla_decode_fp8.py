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
import triton
import triton.language as tl
from torch import Tensor

from deepfuse.ir.cost import Cost, tensor_bytes
from deepfuse.ir.interpreter import interpreted
from deepfuse.ir.op import define
from deepfuse.ir.provider import at_most
from deepfuse.ops.append_latent import PAGE_SIZE
from deepfuse.ops.append_latent_fp8 import (
    cache_is_aligned,
    cache_views,
    check_row,
    num_scales,
    packed_rows,
    unpacked_rows,
)
from deepfuse.ops.dot import dot
from deepfuse.ops.mla_decode import mix_splits, mla_decode_ref, num_splits_for, stream_pages


def mla_decode_fp8_ref(
    q_latent: Tensor, q_rope: Tensor, cache: Tensor, block_table: Tensor, seqlens: Tensor, scale: float
) -> Tensor:
    B, P = block_table.shape
    pages = torch.cat(unpacked_rows(cache[block_table].flatten(0, 1), q_latent.shape[2], q_latent.dtype), -1)
    # the pages lie in the order of the table now
    table = torch.arange(B * P, device=cache.device).view(B, P)
    return mla_decode_ref(q_latent, q_rope, pages, table, seqlens, scale)


@triton.jit(do_not_specialize=["P", "NUM_SPLITS"])
def _mla_decode_fp8_kernel(
    q_latent_ptr, q_rope_ptr, values_ptr, scales_ptr, rope_ptr, block_table_ptr, seqlens_ptr, out_ptr, lse_ptr, scale,
    H, P, NUM_SPLITS, page_bytes, ROW_BYTES: tl.constexpr, PAGE: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    SCALES: tl.constexpr, PAD_C: tl.constexpr, PAD_R: tl.constexpr, PAD_SCALES: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr, DOT_FLOAT32: tl.constexpr,
):  # fmt: skip
    """``_mla_decode_kernel``, but for the rows: read as bytes, they are dequantized before they are keys and values."""
    split, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    seqlen = tl.load(seqlens_ptr + b).to(tl.int32)
    split_size = tl.cdiv(tl.cdiv(seqlen, PAGE), NUM_SPLITS) * PAGE
    begin = split * split_size
    end = min(begin + split_size, seqlen)
    h0, h_s = tl.program_id(0) * BLOCK_H, tl.arange(0, BLOCK_H)
    q_row, out_row = b * H + h0, (b * NUM_SPLITS + split) * H + h0
    if (begin >= seqlen) & (split > 0):  # the first split of an empty sequence gives its zeros
        tl.store(lse_ptr + out_row + h_s, tl.full((BLOCK_H,), float("-inf"), tl.float32), mask=h_s < H - h0)
        return
    c, r, t_s = tl.arange(0, PAD_C), tl.arange(0, PAD_R), tl.arange(0, BLOCK_T)
    g = tl.arange(0, PAD_SCALES)
    mask_h = (h_s < H - h0)[:, None]
    tile_hc, tile_hr = h_s[:, None] * C + c[None, :], h_s[:, None] * R + r[None, :]
    q_latent = tl.load(q_latent_ptr + q_row * C + tile_hc, mask=mask_h & (c < C)[None, :], other=0.0)
    q_rope = tl.load(q_rope_ptr + q_row * R + tile_hr, mask=mask_h & (r < R)[None, :], other=0.0)
    scale_log2 = scale * 1.4426950408889634
    m = tl.full((BLOCK_H,), -1e30, tl.float32)  # finite: no NaN from an empty sequence
    denominator = tl.zeros((BLOCK_H,), tl.float32)
    acc = tl.zeros((BLOCK_H, PAD_C), tl.float32)
    # at least one turn, for mla_attention's reason
    for turn in range(max(tl.cdiv(end - begin, BLOCK_T), 1)):
        t0 = begin + turn * BLOCK_T
        page = tl.load(block_table_ptr + b * P + t0 // PAGE, mask=t0 < end, other=0).to(tl.int64)
        row = page * page_bytes + (t0 % PAGE + t_s)[:, None] * ROW_BYTES
        live = (t0 + t_s < end)[:, None]
        values = tl.load(values_ptr + row + c[None, :], mask=live & (c < C)[None, :], other=0.0)
        scales = tl.load(scales_ptr + (row + C) // 4 + g[None, :], mask=live & (g < SCALES)[None, :], other=0.0)
        k_rope = tl.load(rope_ptr + (row + C) // 2 + 2 * SCALES + r[None, :], mask=live & (r < R)[None, :], other=0.0)
        blocks = tl.reshape(values.to(tl.float32), (BLOCK_T, PAD_SCALES, PAD_C // PAD_SCALES)) * scales[:, :, None]
        latent = tl.reshape(blocks, (BLOCK_T, PAD_C)).to(q_latent.dtype)
        s = dot(q_latent, tl.trans(latent), tl.zeros((BLOCK_H, BLOCK_T), tl.float32), DOT_FLOAT32)
        k_rope = k_rope.to(tl.float32).to(q_rope.dtype)
        # two products, a sum and a branch, for mla_decode's reason
        s_rope = dot(q_rope, tl.trans(k_rope), tl.zeros((BLOCK_H, BLOCK_T), tl.float32), DOT_FLOAT32)
        s = s * scale_log2 + s_rope * scale_log2
        if t0 + BLOCK_T > end:
            s = tl.where(tl.trans(live), s, float("-inf"))
        m_next = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - m_next[:, None])
        shrink = tl.exp2(m - m_next)
        denominator = denominator * shrink + tl.sum(p, 1)
        acc = dot(p.to(latent.dtype), latent, acc * shrink[:, None], DOT_FLOAT32)
        m = m_next
    out = acc / tl.where(denominator == 0.0, 1.0, denominator)[:, None]
    tl.store(out_ptr + out_row * C + tile_hc, out.to(out_ptr.dtype.element_ty), mask=mask_h & (c < C)[None, :])
    # base 2: mla_decode's second kernel is its only reader
    tl.store(lse_ptr + out_row + h_s, m + tl.log2(denominator), mask=h_s < H - h0)


def _launch(
    q_latent: Tensor, q_rope: Tensor, cache: Tensor, block_table: Tensor, seqlens: Tensor, scale: float
) -> Tensor:
    (B, H, C), P, R = q_latent.shape, block_table.shape[1], q_rope.shape[2]
    out = torch.empty(q_latent.shape, dtype=q_latent.dtype, device=q_latent.device)
    if out.numel() == 0:
        return out
    if P == 0:
        return out.zero_()
    # in blocks of 128 if there are several
    pad_c, pad_r = (max(triton.next_power_of_2(width), 16) for width in (C, R))
    if q_latent.element_size() == 2:
        # 64 heads are what a warpgroup multiplies; a block of rows waits in registers, so it is half of mla_decode's
        block_h, block_t, num_stages = (64 if H > 16 else 16), 32, 2
    else:
        # without tensor cores operands wait in registers too, and there is no room for those of the next turn
        block_h, block_t, num_stages = 16, 16, 1
    num_blocks = triton.cdiv(H, block_h)
    num_splits = num_splits_for(B * num_blocks, P)
    lse = torch.empty((B, num_splits, H), dtype=torch.float32, device=out.device)
    partial = out
    if num_splits > 1:
        partial = torch.empty((B, num_splits, H, C), dtype=torch.float32, device=out.device)
    _mla_decode_fp8_kernel[(num_blocks, num_splits, B)](
        q_latent.contiguous(), q_rope.contiguous(), *cache_views(cache), block_table.contiguous(),
        seqlens.contiguous(), partial, lse, scale, H, P, num_splits, cache.stride(0), cache.stride(1), PAGE=PAGE_SIZE,
        C=C, R=R, SCALES=num_scales(C), PAD_C=pad_c, PAD_R=pad_r, PAD_SCALES=max(pad_c // 128, 1), BLOCK_H=block_h,
        BLOCK_T=block_t, DOT_FLOAT32=interpreted(), num_warps=8, num_stages=num_stages,
    )  # fmt: skip
    if num_splits > 1:
        mix_splits(partial, lse, out)
    return out


def _fits(q_latent: Tensor, q_rope: Tensor, cache: Tensor, *rest: Any) -> str | None:
    if q_latent.dtype == torch.float64:
        return "computes in float32 at most"
    if not (at_most(q_latent.shape[2], 512) and at_most(q_rope.shape[2], 64)):
        return f"a latent of at most 512 and 64 fits, not {q_latent.shape[2]} and {q_rope.shape[2]}"
    return cache_is_aligned(cache)


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

mla_decode_fp8.provide("triton", _launch, priority={"cuda": 10}, supports=_fits)
mla_decode_fp8.provide("stream", _stream, priority={"cpu": 10}, inline=True)

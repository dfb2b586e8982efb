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
import triton
import triton.language as tl
from torch import Tensor

from deepfuse.ir.cost import Cost, tensor_bytes
from deepfuse.ir.interpreter import interpreted
from deepfuse.ir.op import define
from deepfuse.ir.private import materialize
from deepfuse.ir.provider import at_most
from deepfuse.ops.append_latent import PAGE_SIZE
from deepfuse.ops.dot import dot


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


@triton.jit(do_not_specialize=["P", "NUM_SPLITS"])
def _mla_decode_kernel(
    q_latent_ptr, q_rope_ptr, cache_ptr, block_table_ptr, seqlens_ptr, out_ptr, lse_ptr, scale, H, P, NUM_SPLITS,
    page_stride, ROW_STRIDE: tl.constexpr, PAGE: tl.constexpr, C: tl.constexpr, R: tl.constexpr, PAD_C: tl.constexpr,
    PAD_R: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr, DOT_FLOAT32: tl.constexpr,
):  # fmt: skip
    """One program per block of heads, split of a sequence's pages, and sequence: online softmax over the rows.

    A row is loaded once: keys are the whole of it, values its first C numbers.
    """
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
        row_ptrs = cache_ptr + page * page_stride + (t0 % PAGE) * ROW_STRIDE + t_s[:, None] * ROW_STRIDE
        live = t0 + t_s < end
        latent = tl.load(row_ptrs + c[None, :], mask=live[:, None] & (c < C)[None, :], other=0.0)
        k_rope = tl.load(row_ptrs + C + r[None, :], mask=live[:, None] & (r < R)[None, :], other=0.0)
        s = dot(q_latent, tl.trans(latent), tl.zeros((BLOCK_H, BLOCK_T), tl.float32), DOT_FLOAT32)
        # two products, a sum and a branch: from a product that leads to another one without a branch, by its sum or by
        # its operand, Triton lets both warpgroups compute all 64 rows
        s_rope = dot(q_rope, tl.trans(k_rope), tl.zeros((BLOCK_H, BLOCK_T), tl.float32), DOT_FLOAT32)
        s = s * scale_log2 + s_rope * scale_log2
        if t0 + BLOCK_T > end:
            s = tl.where(live[None, :], s, float("-inf"))
        m_next = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - m_next[:, None])
        shrink = tl.exp2(m - m_next)
        denominator = denominator * shrink + tl.sum(p, 1)
        acc = dot(p.to(latent.dtype), latent, acc * shrink[:, None], DOT_FLOAT32)
        m = m_next
    out = acc / tl.where(denominator == 0.0, 1.0, denominator)[:, None]
    tl.store(out_ptr + out_row * C + tile_hc, out.to(out_ptr.dtype.element_ty), mask=mask_h & (c < C)[None, :])
    # base 2: the kernel below is its only reader
    tl.store(lse_ptr + out_row + h_s, m + tl.log2(denominator), mask=h_s < H - h0)


@triton.jit(do_not_specialize=["NUM_SPLITS"])
def _mla_decode_reduce_kernel(
    partial_ptr, lse_ptr, out_ptr, H, NUM_SPLITS, C: tl.constexpr, PAD_C: tl.constexpr, PAD_SPLITS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """One program per head and sequence: the mean of the splits, weighted by what they summed."""
    h, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    lse_ptrs = lse_ptr + b * NUM_SPLITS * H + h
    every = tl.arange(0, PAD_SPLITS)
    lse = tl.load(lse_ptrs + every * H, mask=every < NUM_SPLITS, other=float("-inf"))
    top = tl.maximum(tl.max(lse, 0), -1e30)
    total = tl.sum(tl.exp2(lse - top), 0)
    c, acc = tl.arange(0, PAD_C), tl.zeros((PAD_C,), tl.float32)
    for first in range(0, NUM_SPLITS, BLOCK_SPLITS):
        splits = first + tl.arange(0, BLOCK_SPLITS)
        weight = tl.exp2(tl.load(lse_ptrs + splits * H, mask=splits < NUM_SPLITS, other=float("-inf")) - top)
        rows = (b * NUM_SPLITS + splits) * H + h
        # splits without tokens have written no partial sum
        mask = (weight > 0.0)[:, None] & (c < C)[None, :]
        partial = tl.load(partial_ptr + rows[:, None] * C + c[None, :], mask=mask, other=0.0)
        acc += tl.sum(weight[:, None] * partial, 0)
    acc /= tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + (b * H + h) * C + c, acc.to(out_ptr.dtype.element_ty), mask=c < C)


def _launch(
    q_latent: Tensor, q_rope: Tensor, cache: Tensor, block_table: Tensor, seqlens: Tensor, scale: float
) -> Tensor:
    (B, H, C), P, R = q_latent.shape, block_table.shape[1], q_rope.shape[2]
    out = torch.empty(q_latent.shape, dtype=q_latent.dtype, device=q_latent.device)
    if out.numel() == 0:
        return out
    if P == 0:
        return out.zero_()
    pad_c, pad_r = (max(triton.next_power_of_2(width), 16) for width in (C, R))
    if q_latent.element_size() == 2:
        # 64 heads are what a warpgroup multiplies; their [64, 512] accumulator takes 128 registers of 256 threads, and
        # the queries, two pages and the weights 224 KiB of shared memory. Few heads are padded to 16, not to 64
        block_h, block_t, num_warps, num_stages = (64 if H > 16 else 16), 64, (8 if H > 16 else 4), 2
    else:
        block_h, block_t, num_warps, num_stages = 16, 16, 8, 2
    num_blocks = triton.cdiv(H, block_h)
    num_splits = num_splits_for(B * num_blocks, P)
    lse = torch.empty((B, num_splits, H), dtype=torch.float32, device=out.device)
    partial = out
    if num_splits > 1:
        partial = torch.empty((B, num_splits, H, C), dtype=torch.float32, device=out.device)
    _mla_decode_kernel[(num_blocks, num_splits, B)](
        q_latent.contiguous(), q_rope.contiguous(), cache, block_table.contiguous(), seqlens.contiguous(), partial,
        lse, scale, H, P, num_splits, cache.stride(0), cache.stride(1), PAGE=PAGE_SIZE, C=C, R=R, PAD_C=pad_c,
        PAD_R=pad_r, BLOCK_H=block_h, BLOCK_T=block_t, DOT_FLOAT32=interpreted(), num_warps=num_warps,
        num_stages=num_stages,
    )  # fmt: skip
    if num_splits > 1:
        mix_splits(partial, lse, out)
    return out


def mix_splits(partial: Tensor, lse: Tensor, out: Tensor) -> None:
    """Fill ``out [B, H, C]`` from what each split found: ``partial [B, S, H, C]`` and ``lse [B, S, H]``, of base 2."""
    (B, H, C), num_splits = out.shape, lse.shape[1]
    pad_c = max(triton.next_power_of_2(C), 16)
    _mla_decode_reduce_kernel[(H, B)](
        partial, lse, out, H, num_splits, C=C, PAD_C=pad_c, PAD_SPLITS=triton.next_power_of_2(num_splits),
        BLOCK_SPLITS=4, num_warps=4 if pad_c >= 256 else 1,
    )  # fmt: skip


def num_splits_for(num_programs: int, P: int) -> int:
    """Splits of each sequence: two programs for each of 132 multiprocessors, which evens out lengths that differ.

    A split reads two pages at least, as many bytes as its queries at DeepSeek-V3's 128 heads. Lengths are on the
    device; the number follows from shapes alone, so that a captured graph serves all lengths.
    """
    return max(min(264 // num_programs, triton.cdiv(P, 2)), 1)


def _fits(q_latent: Tensor, q_rope: Tensor, cache: Tensor, *rest: Any) -> str | None:
    if q_latent.dtype == torch.float64:
        return "computes in float32 at most"
    if not (at_most(q_latent.shape[2], 512) and at_most(q_rope.shape[2], 64)):
        return f"a latent of at most 512 and 64 fits, not {q_latent.shape[2]} and {q_rope.shape[2]}"
    return None if cache.stride(2) == 1 else f"wants a cache with contiguous rows, not strides {list(cache.stride())}"


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

mla_decode.provide("triton", _launch, priority={"cuda": 10}, supports=_fits)
mla_decode.provide("stream", _stream, priority={"cpu": 10}, inline=True)

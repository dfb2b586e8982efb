"""Absorbed attention of one new token per sequence, a part of its tokens at a time: what all forms of it share.

    partial[s, h] = sum over the tokens of split s of softmax(scores[h])[t] c[t],   lse[s, h] = log2 sum exp2 scores

Splits are what keeps a GPU busy with few sequences. ``mla_decode`` and ``mla_decode_fp8`` mix the partial sums, and
``mla_decode_project`` multiplies the mix at once. The cache is one of numbers or in FP8, whose rows are dequantized
before they are keys and values.
Dims: B sequences, H heads, C latent rank, R rotary width, P pages a sequence, S splits of a sequence.
Source: Flash-Decoding, Dao et al. 2023 (pytorch.org/blog/flash-decoding), of the absorbed form of DeepSeek-V2
(arXiv:2405.04434), section 2.1.2.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepfuse.ir.interpreter import interpreted
from deepfuse.ir.provider import at_most
from deepfuse.ops.append_latent import PAGE_SIZE
from deepfuse.ops.append_latent_fp8 import cache_is_aligned, cache_views, is_in_fp8, num_scales
from deepfuse.ops.dot import dot


@triton.jit(do_not_specialize=["P", "NUM_SPLITS"])
def _mla_decode_splits_kernel(
    q_latent_ptr, q_rope_ptr, values_ptr, scales_ptr, rope_ptr, block_table_ptr, seqlens_ptr, out_ptr, lse_ptr, scale,
    H, P, NUM_SPLITS, page_stride, ROW_STRIDE: tl.constexpr, PAGE: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    FP8: tl.constexpr, SCALES: tl.constexpr, PAD_C: tl.constexpr, PAD_R: tl.constexpr, PAD_SCALES: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr, DOT_FLOAT32: tl.constexpr,
):  # fmt: skip
    """One program per block of heads, split of a sequence's pages, and sequence: online softmax over the rows.

    A row is loaded once: keys are the whole of it, values its first C numbers. A cache in FP8 comes as three views, of
    float8, float32 and bfloat16.
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
        live = t0 + t_s < end
        mask_c, mask_r = live[:, None] & (c < C)[None, :], live[:, None] & (r < R)[None, :]
        if FP8:
            g = tl.arange(0, PAD_SCALES)
            row = page * page_stride + (t0 % PAGE + t_s)[:, None] * ROW_STRIDE
            values = tl.load(values_ptr + row + c[None, :], mask=mask_c, other=0.0)
            mask_g = live[:, None] & (g < SCALES)[None, :]
            scales = tl.load(scales_ptr + (row + C) // 4 + g[None, :], mask=mask_g, other=0.0)
            k_rope = tl.load(rope_ptr + (row + C) // 2 + 2 * SCALES + r[None, :], mask=mask_r, other=0.0)
            blocks = tl.reshape(values.to(tl.float32), (BLOCK_T, PAD_SCALES, PAD_C // PAD_SCALES)) * scales[:, :, None]
            latent = tl.reshape(blocks, (BLOCK_T, PAD_C)).to(q_latent.dtype)
            k_rope = k_rope.to(tl.float32).to(q_rope.dtype)
        else:
            row_ptrs = values_ptr + page * page_stride + (t0 % PAGE) * ROW_STRIDE + t_s[:, None] * ROW_STRIDE
            latent = tl.load(row_ptrs + c[None, :], mask=mask_c, other=0.0)
            k_rope = tl.load(row_ptrs + C + r[None, :], mask=mask_r, other=0.0)
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
    # base 2: kernels that mix splits are its only readers
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


def split_attention(
    q_latent: Tensor, q_rope: Tensor, cache: Tensor, block_table: Tensor, seqlens: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Arguments of ``mla_decode`` or ``mla_decode_fp8``, with queries.

    Returns:
        ``partial [B, S, H, C]`` float32 and ``lse [B, S, H]`` of base 2, -inf for a split without tokens, which has
        written no partial sum. Of one split, the mix ``[B, 1, H, C]`` in the dtype of the queries.
    """
    (B, H, C), P, R, fp8 = q_latent.shape, block_table.shape[1], q_rope.shape[2], is_in_fp8(cache)
    if P == 0:
        return q_latent.new_zeros(B, 1, H, C), torch.zeros((B, 1, H), dtype=torch.float32, device=q_latent.device)
    # of FP8, in blocks of 128 if there are several
    pad_c, pad_r = (max(triton.next_power_of_2(width), 16) for width in (C, R))
    if q_latent.element_size() == 2:
        # 64 heads are what a warpgroup multiplies; their [64, 512] accumulator takes 128 registers of 256 threads, and
        # the queries, two pages and the weights 224 KiB of shared memory. In FP8 a block of rows waits in registers, so
        # it is half as large. Few heads are padded to 16, not to 64
        block_h, block_t, num_stages = (64 if H > 16 else 16), (32 if fp8 else 64), 2
        num_warps = 8 if fp8 or H > 16 else 4
    else:
        # without tensor cores operands wait in registers too, and in FP8 there is no room for those of the next turn
        block_h, block_t, num_warps, num_stages = 16, 16, 8, 1 if fp8 else 2
    num_blocks = triton.cdiv(H, block_h)
    num_splits = num_splits_for(B * num_blocks, P)
    lse = torch.empty((B, num_splits, H), dtype=torch.float32, device=q_latent.device)
    dtype = torch.float32 if num_splits > 1 else q_latent.dtype
    partial = torch.empty((B, num_splits, H, C), dtype=dtype, device=q_latent.device)
    _mla_decode_splits_kernel[(num_blocks, num_splits, B)](
        q_latent.contiguous(), q_rope.contiguous(), *(cache_views(cache) if fp8 else (cache, cache, cache)),
        block_table.contiguous(), seqlens.contiguous(), partial, lse, scale, H, P, num_splits, cache.stride(0),
        cache.stride(1), PAGE=PAGE_SIZE, C=C, R=R, FP8=fp8, SCALES=num_scales(C), PAD_C=pad_c, PAD_R=pad_r,
        PAD_SCALES=max(pad_c // 128, 1), BLOCK_H=block_h, BLOCK_T=block_t, DOT_FLOAT32=interpreted(),
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return partial, lse


def mixed_attention(
    q_latent: Tensor, q_rope: Tensor, cache: Tensor, block_table: Tensor, seqlens: Tensor, scale: float
) -> Tensor:
    """The kernels of ``mla_decode`` and ``mla_decode_fp8``: splits, and their mean, weighted by what they summed."""
    if q_latent.numel() == 0:
        return torch.empty(q_latent.shape, dtype=q_latent.dtype, device=q_latent.device)
    partial, lse = split_attention(q_latent, q_rope, cache, block_table, seqlens, scale)
    (B, H, C), num_splits = q_latent.shape, lse.shape[1]
    if num_splits == 1:
        return partial[:, 0]
    out = torch.empty((B, H, C), dtype=q_latent.dtype, device=q_latent.device)
    pad_c = max(triton.next_power_of_2(C), 16)
    _mla_decode_reduce_kernel[(H, B)](
        partial, lse, out, H, num_splits, C=C, PAD_C=pad_c, PAD_SPLITS=triton.next_power_of_2(num_splits),
        BLOCK_SPLITS=4, num_warps=4 if pad_c >= 256 else 1,
    )  # fmt: skip
    return out


def num_splits_for(num_programs: int, P: int) -> int:
    """Splits of each sequence: two programs for each of 132 multiprocessors, which evens out lengths that differ.

    A split reads two pages at least, as many bytes as its queries at DeepSeek-V3's 128 heads. Lengths are on the
    device; the number follows from shapes alone, so that a captured graph serves all lengths.
    """
    return max(min(264 // num_programs, triton.cdiv(P, 2)), 1)


def splits_fit(q_latent: Tensor, q_rope: Tensor, cache: Tensor, *rest: Any) -> str | None:
    """Why the kernels do not take these arguments, or ``None``."""
    if q_latent.dtype == torch.float64:
        return "computes in float32 at most"
    if not (at_most(q_latent.shape[2], 512) and at_most(q_rope.shape[2], 64)):
        return f"a latent of at most 512 and 64 fits, not {q_latent.shape[2]} and {q_rope.shape[2]}"
    if is_in_fp8(cache):
        return cache_is_aligned(cache)
    return None if cache.stride(2) == 1 else f"wants a cache with contiguous rows, not strides {list(cache.stride())}"

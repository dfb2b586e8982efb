"""Multi-head latent attention over expanded keys and values, causal, for sequences of different lengths.

    k[h] = [kv[h, :N] | k_rope],  v[h] = kv[h, N:]
    out[h] = softmax(q[h] k[h]^T * scale + causal) v[h],  lse[h] = log sum exp of the masked scores

Sequences and Dims: as in ``attention_arguments.py``.
Source: DeepSeek-V3 (arXiv:2412.19437), eq. 1-11; FlashAttention-2 (arXiv:2307.08691) for the kernel.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepfuse.ir.cost import Cost, tensor_bytes
from deepfuse.ir.op import define
from deepfuse.ir.private import flash_attention_cpu
from deepfuse.ir.provider import float32_at_most
from deepfuse.ir.tolerance import Tolerance
from deepfuse.ops.attention_arguments import (
    attention_flops,
    batches,
    check_arguments,
    keys_and_values,
    padded,
    padded_width,
    put,
    query_block,
    rows_of,
    sample_arguments,
    sequences,
    stats_dtype,
    take,
    tile_constants,
    tiles_fit,
    value_width,
    visible,
)
from deepfuse.ops.dot import dot
from deepfuse.ops.mla_attention_backward import mla_attention_backward


def mla_attention_ref(
    q: Tensor, kv: Tensor, k_rope: Tensor, q_start: Tensor, k_start: Tensor, k_len: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    compute = torch.promote_types(q.dtype, torch.float32)
    T, H, V = *q.shape[:2], value_width(q, kv, k_rope)
    out, lse = q.new_zeros(T, H, V), torch.full((T, H), float("-inf"), dtype=compute, device=q.device)
    for queries, keys in sequences(q_start, k_start, k_len):
        q_HQD, k_HKD, v_HKV = (t.to(compute).transpose(0, 1) for t in rows_of(q, kv, k_rope, queries, keys))
        scores_HQK = q_HQD @ k_HKD.transpose(1, 2) * scale
        scores_HQK = scores_HQK.masked_fill(~visible(scores_HQK), float("-inf"))
        lse_HQ = scores_HQK.logsumexp(-1)
        out[queries] = ((scores_HQK - lse_HQ[..., None]).exp() @ v_HKV).transpose(0, 1).to(out.dtype)
        lse[queries] = lse_HQ.transpose(0, 1)
    return out, lse


@triton.jit(do_not_specialize=["T", "B"])
def _mla_attention_kernel(
    q_ptr, kv_ptr, k_rope_ptr, q_start_ptr, k_start_ptr, k_len_ptr, out_ptr, lse_ptr, scale, T, B, H: tl.constexpr,
    N: tl.constexpr, R: tl.constexpr, V: tl.constexpr, PAD_N: tl.constexpr, PAD_R: tl.constexpr, PAD_V: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, DOT_FLOAT32: tl.constexpr,
):  # fmt: skip
    """One program per block of queries and head: online softmax over the blocks of keys they see."""
    begin, Q, key, K, i0 = query_block(q_start_ptr, k_start_ptr, k_len_ptr, T, B, BLOCK_B, BLOCK_Q)
    if i0 >= Q:
        return
    h = tl.program_id(1).to(tl.int64)
    n, r, v = tl.arange(0, PAD_N), tl.arange(0, PAD_R), tl.arange(0, PAD_V)
    i_s, j_s = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    i = i0 + i_s
    row = (begin + i0) * H + h
    q_ptrs = q_ptr + row * (N + R) + i_s[:, None] * (H * (N + R))
    q_nope = tl.load(q_ptrs + n[None, :], mask=(i < Q)[:, None] & (n < N)[None, :], other=0.0)
    q_rope = tl.load(q_ptrs + N + r[None, :], mask=(i < Q)[:, None] & (r < R)[None, :], other=0.0)
    scale_log2 = scale * 1.4426950408889634  # log2(e): powers of two are what the hardware has
    m = tl.full((BLOCK_Q,), -1e30, tl.float32)  # finite: no NaN from a block without a visible key
    denominator = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, PAD_V), tl.float32)
    # query i sees the keys up to i + K - Q. At least one turn, also without keys: were the loop left out, registers that
    # a product still writes to would be set by other instructions, and ptxas would run all products one by one
    kv_tile, k_rope_tile = j_s[:, None] * (H * (N + V)), j_s[:, None] * R
    for j0 in range(0, max(min(i0 + BLOCK_Q + K - Q, K), 1), BLOCK_K):
        j = j0 + j_s
        kv_ptrs = kv_ptr + ((key + j0) * H + h) * (N + V) + kv_tile
        k_rope_ptrs = k_rope_ptr + (key + j0) * R + k_rope_tile
        k_nope = tl.load(kv_ptrs + n[None, :], mask=(j < K)[:, None] & (n < N)[None, :], other=0.0)
        k_rope = tl.load(k_rope_ptrs + r[None, :], mask=(j < K)[:, None] & (r < R)[None, :], other=0.0)
        value = tl.load(kv_ptrs + N + v[None, :], mask=(j < K)[:, None] & (v < V)[None, :], other=0.0)
        s = dot(q_nope, tl.trans(k_nope), tl.zeros((BLOCK_Q, BLOCK_K), tl.float32), DOT_FLOAT32)
        s = dot(q_rope, tl.trans(k_rope), s, DOT_FLOAT32) * scale_log2
        if j0 + BLOCK_K > i0 + K - Q + 1:  # on the diagonal; blocks before it are seen whole
            s = tl.where(j_s[None, :] <= i_s[:, None] + (i0 + K - Q - j0), s, float("-inf"))
        m_next = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - m_next[:, None])
        shrink = tl.exp2(m - m_next)
        denominator = denominator * shrink + tl.sum(p, 1)
        acc = dot(p.to(value.dtype), value, acc * shrink[:, None], DOT_FLOAT32)
        m = m_next
    out = acc / tl.where(denominator == 0.0, 1.0, denominator)[:, None]
    out_ptrs = out_ptr + row * V + i_s[:, None] * (H * V) + v[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=(i < Q)[:, None] & (v < V)[None, :])
    tl.store(lse_ptr + row + i_s * H, (m + tl.log2(denominator)) * 0.6931471805599453, mask=i < Q)


def _launch(
    q: Tensor, kv: Tensor, k_rope: Tensor, q_start: Tensor, k_start: Tensor, k_len: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    (T, H, _), B = q.shape, k_len.shape[0]
    out = torch.empty((T, H, value_width(q, kv, k_rope)), dtype=q.dtype, device=q.device)
    lse = torch.empty((T, H), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    if q.element_size() == 4 or padded_width(q, kv, k_rope) > 320:
        block_q, block_k, num_warps, num_stages = 32, 32, 4, 1
    elif T > 64 * B:
        # two warpgroups of 64 rows; at the widths of DeepSeek-V3 215 registers and 168 KiB of shared memory
        block_q, block_k, num_warps, num_stages = 128, 64, 8, 3
    else:
        block_q, block_k, num_warps, num_stages = (64 if T > 16 * B else 16), 64, 4, 2
    _mla_attention_kernel[(triton.cdiv(T, block_q) + B, H)](
        *(t.contiguous() for t in (q, kv, k_rope, q_start, k_start, k_len)), out, lse, scale, T, B, H,
        **tile_constants(q, kv, k_rope, B, block_q, block_k), num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return out, lse


def _flash_cpu(
    q: Tensor, kv: Tensor, k_rope: Tensor, q_start: Tensor, k_start: Tensor, k_len: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """PyTorch's fused attention on a CPU, one call for all sequences of the same lengths."""
    (T, H, D), V = q.shape, value_width(q, kv, k_rope)
    q, kv, k_rope = q.contiguous(), kv.contiguous(), k_rope.contiguous()  # other strides give wrong numbers
    out, lse = q.new_zeros(T, H, V), q.new_full((T, H), float("-inf"), dtype=stats_dtype(q))
    width = max(D, V)
    for queries, keys, masks in batches(q, q_start, k_start, k_len):
        q_BHQD = padded(take(q, *queries), width).transpose(1, 2)
        k_BHKD, v_BHKD = keys_and_values(kv, k_rope, keys, D, width)
        out_BHQD, lse_BHQ = flash_attention_cpu(q_BHQD, k_BHKD, v_BHKD, scale, **masks)
        put(out, *queries, out_BHQD.transpose(1, 2)[..., :V])
        put(lse, *queries, lse_BHQ.transpose(1, 2))
    return out, lse


def _fake(
    q: Tensor, kv: Tensor, k_rope: Tensor, q_start: Tensor, k_start: Tensor, k_len: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:2], value_width(q, kv, k_rope)), q.new_empty(q.shape[:2], dtype=stats_dtype(q))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, kv, k_rope, q_start, k_start, k_len, ctx.scale = inputs
    ctx.save_for_backward(q, kv, k_rope, *output, q_start, k_start, k_len)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dout: Tensor, dlse: Any) -> tuple[Any, ...]:
    grads = mla_attention_backward(dout, *ctx.saved_tensors, ctx.scale)
    return *grads, None, None, None, None


def _cost(q: Tensor, kv: Tensor, k_rope: Tensor, q_start: Tensor, k_start: Tensor, k_len: Tensor, scale: float) -> Cost:
    (T, H, D), V = q.shape, value_width(q, kv, k_rope)
    flops = attention_flops(q, kv, k_len, D + V)
    return Cost(flops=flops, bytes=tensor_bytes(q, kv, k_rope) + T * H * V * q.itemsize)


# fused kernels round each weight to the dtype before it meets a value (the reference does not): an error of up to
# 2**-8, 2**-11 of a mean of |v|, which is near one in the samples
TOLERANCE = {
    torch.bfloat16: Tolerance(atol=2**-8, rtol=1.6e-2),
    torch.float16: Tolerance(atol=2**-10, rtol=2e-3),
}

mla_attention = define(
    "mla_attention(Tensor q, Tensor kv, Tensor k_rope, Tensor q_start, Tensor k_start, Tensor k_len, float scale)"
    " -> (Tensor, Tensor)",
    reference=mla_attention_ref,
    check=check_arguments,
    fake=_fake,
    cost=_cost,
    samples=sample_arguments,
    tolerance=TOLERANCE,
    setup_context=_setup_context,
    backward=_backward,
    inline_reference=False,
)
"""Causal attention of each sequence.

Args:
    q: ``[T, H, N + R]``, rotary part last, rotated.
    kv: ``[S, H, N + V]``: the latent expanded by ``kv_b_proj``; per head the keys' nope part, then the values.
    k_rope: ``[S, R]``, rotated, shared by the heads.
    q_start: ``[B + 1]`` int32, first query of each sequence, and T.
    k_start, k_len: ``[B]`` int32, first key and number of keys of each sequence.
    scale: of the scores (YaRN's mscale included).

Returns:
    ``out [T, H, V]`` in the dtype of ``q``, ``lse [T, H]`` in float32 (not differentiable).

Raises:
    ValueError: shapes do not fit.
    TypeError: dtypes differ.
"""

mla_attention.provide("torch", _flash_cpu, priority={"cpu": 5}, supports=float32_at_most)
mla_attention.provide("triton", _launch, priority={"cuda": 10}, supports=tiles_fit)

"""Gradient of ``mla_attention`` with respect to queries, expanded keys and values, and rotary keys.

    p = exp(q[h] k[h]^T * scale - lse)                 0 where masked
    ds = p * (dout v[h]^T - rowsum(dout * out)) * scale
    dv[h] = p^T dout,  dk[h] = ds^T q[h],  dq[h] = ds k[h]

Sequences and Dims: as in ``attention_arguments.py``.
Source: FlashAttention-2 (arXiv:2307.08691), algorithm 2.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepfuse.ir.cost import Cost, tensor_bytes
from deepfuse.ir.op import define
from deepfuse.ir.private import flash_attention_cpu_backward
from deepfuse.ir.provider import float32_at_most
from deepfuse.ir.sizes import differ
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


def mla_attention_backward_ref(
    dout: Tensor,
    q: Tensor,
    kv: Tensor,
    k_rope: Tensor,
    out: Tensor,
    lse: Tensor,
    q_start: Tensor,
    k_start: Tensor,
    k_len: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    compute = torch.promote_types(q.dtype, torch.float32)
    N = q.shape[-1] - k_rope.shape[-1]
    dq, dkv, dk_rope = torch.zeros_like(q), torch.zeros_like(kv), torch.zeros_like(k_rope)
    for queries, keys in sequences(q_start, k_start, k_len):
        q_HQD, k_HKD, v_HKV = (t.to(compute).transpose(0, 1) for t in rows_of(q, kv, k_rope, queries, keys))
        dout_HQV, out_HQV = (t[queries].to(compute).transpose(0, 1) for t in (dout, out))
        scores_HQK = q_HQD @ k_HKD.transpose(1, 2) * scale
        p_HQK = (scores_HQK - lse[queries].transpose(0, 1)[..., None]).exp()
        p_HQK = p_HQK.masked_fill(~visible(p_HQK), 0.0)
        dp_HQK = dout_HQV @ v_HKV.transpose(1, 2)
        ds_HQK = p_HQK * (dp_HQK - (dout_HQV * out_HQV).sum(-1, keepdim=True)) * scale
        dk_HKD = ds_HQK.transpose(1, 2) @ q_HQD
        dq[queries] = (ds_HQK @ k_HKD).transpose(0, 1).to(dq.dtype)
        dkv[keys] = torch.cat((dk_HKD[..., :N], p_HQK.transpose(1, 2) @ dout_HQV), -1).transpose(0, 1).to(dkv.dtype)
        dk_rope[keys] = dk_HKD[..., N:].sum(0).to(dk_rope.dtype)
    return dq, dkv, dk_rope


@triton.jit(do_not_specialize=["T", "B"])
def _mla_attention_dq_kernel(
    dout_ptr, q_ptr, kv_ptr, k_rope_ptr, out_ptr, lse_ptr, q_start_ptr, k_start_ptr, k_len_ptr, dq_ptr, lse_log2_ptr,
    delta_ptr, scale, T, B, H: tl.constexpr,
    N: tl.constexpr, R: tl.constexpr, V: tl.constexpr, PAD_N: tl.constexpr, PAD_R: tl.constexpr, PAD_V: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, DOT_FLOAT32: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of queries of one head, and ``delta = rowsum(dout * out)`` for the kernel after it."""
    begin, Q, key, K, i0 = query_block(q_start_ptr, k_start_ptr, k_len_ptr, T, B, BLOCK_B, BLOCK_Q)
    if i0 >= Q:
        return
    h = tl.program_id(1).to(tl.int64)
    n, r, v = tl.arange(0, PAD_N), tl.arange(0, PAD_R), tl.arange(0, PAD_V)
    i_s, j_s = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    i = i0 + i_s
    row = (begin + i0) * H + h
    q_tile, out_tile = i_s[:, None] * (H * (N + R)), i_s[:, None] * (H * V) + v[None, :]
    mask_n, mask_r = (i < Q)[:, None] & (n < N)[None, :], (i < Q)[:, None] & (r < R)[None, :]
    mask_v = (i < Q)[:, None] & (v < V)[None, :]
    q_nope = tl.load(q_ptr + row * (N + R) + q_tile + n[None, :], mask=mask_n, other=0.0)
    q_rope = tl.load(q_ptr + row * (N + R) + N + q_tile + r[None, :], mask=mask_r, other=0.0)
    dout = tl.load(dout_ptr + row * V + out_tile, mask=mask_v, other=0.0)
    out = tl.load(out_ptr + row * V + out_tile, mask=mask_v, other=0.0)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    lse_log2 = tl.load(lse_ptr + row + i_s * H, mask=i < Q, other=0.0) * 1.4426950408889634
    tl.store(lse_log2_ptr + h * T + begin + i, lse_log2, mask=i < Q)
    tl.store(delta_ptr + h * T + begin + i, delta, mask=i < Q)
    scale_log2 = scale * 1.4426950408889634
    dq_nope, dq_rope = tl.zeros((BLOCK_Q, PAD_N), tl.float32), tl.zeros((BLOCK_Q, PAD_R), tl.float32)
    kv_tile, k_rope_tile = j_s[:, None] * (H * (N + V)), j_s[:, None] * R
    for j0 in range(0, max(min(i0 + BLOCK_Q + K - Q, K), 1), BLOCK_K):
        j = j0 + j_s
        kv_ptrs = kv_ptr + ((key + j0) * H + h) * (N + V) + kv_tile
        k_rope_ptrs = k_rope_ptr + (key + j0) * R + k_rope_tile
        k_nope = tl.load(kv_ptrs + n[None, :], mask=(j < K)[:, None] & (n < N)[None, :], other=0.0)
        k_rope = tl.load(k_rope_ptrs + r[None, :], mask=(j < K)[:, None] & (r < R)[None, :], other=0.0)
        value = tl.load(kv_ptrs + N + v[None, :], mask=(j < K)[:, None] & (v < V)[None, :], other=0.0)
        s = dot(q_nope, tl.trans(k_nope), tl.zeros((BLOCK_Q, BLOCK_K), tl.float32), DOT_FLOAT32)
        s = dot(q_rope, tl.trans(k_rope), s, DOT_FLOAT32)
        p = tl.exp2(s * scale_log2 - lse_log2[:, None])
        if j0 + BLOCK_K > i0 + K - Q + 1:
            p = tl.where(j_s[None, :] <= i_s[:, None] + (i0 + K - Q - j0), p, 0.0)
        dp = dot(dout, tl.trans(value), tl.zeros((BLOCK_Q, BLOCK_K), tl.float32), DOT_FLOAT32)
        ds = (p * (dp - delta[:, None])).to(k_nope.dtype)
        dq_nope = dot(ds, k_nope, dq_nope, DOT_FLOAT32)
        dq_rope = dot(ds, k_rope, dq_rope, DOT_FLOAT32)
    dtype = dq_ptr.dtype.element_ty
    tl.store(dq_ptr + row * (N + R) + q_tile + n[None, :], (dq_nope * scale).to(dtype), mask=mask_n)
    tl.store(dq_ptr + row * (N + R) + N + q_tile + r[None, :], (dq_rope * scale).to(dtype), mask=mask_r)


@triton.jit(do_not_specialize=["T", "S", "B"])
def _mla_attention_dkv_kernel(
    dout_ptr, q_ptr, kv_ptr, k_rope_ptr, lse_log2_ptr, delta_ptr, q_start_ptr, k_start_ptr, k_len_ptr, dkv_ptr,
    dk_rope_ptr, scale, T, S, B, H: tl.constexpr,
    N: tl.constexpr, R: tl.constexpr, V: tl.constexpr, PAD_N: tl.constexpr, PAD_R: tl.constexpr, PAD_V: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, DOT_FLOAT32: tl.constexpr,
    OF_VALUES: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of values, or of keys, of one head; ``dk_rope [H, S, R]`` is left to be summed over heads.

    Values and keys take a launch each, which computes the scores twice (a sixth more work in the backward pass): the
    accumulators of both, [BLOCK_K, 320] for DeepSeek-V3, leave no registers for blocks the tensor cores like.
    """
    bs = tl.arange(0, BLOCK_B)
    blocks = tl.cdiv(tl.load(k_len_ptr + bs, mask=bs < B, other=0).to(tl.int32), BLOCK_K)
    b = tl.sum((tl.cumsum(blocks, 0) <= tl.program_id(0)).to(tl.int32), 0)
    if b >= B:
        return
    j0 = (tl.program_id(0) - tl.sum(tl.where(bs < b, blocks, 0), 0)) * BLOCK_K
    begin = tl.load(q_start_ptr + b).to(tl.int32)
    Q = tl.load(q_start_ptr + b + 1).to(tl.int32) - begin
    K = tl.load(k_len_ptr + b).to(tl.int32)
    h = tl.program_id(1).to(tl.int64)
    n, r, v = tl.arange(0, PAD_N), tl.arange(0, PAD_R), tl.arange(0, PAD_V)
    i_s, j_s = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    j = j0 + j_s
    key = tl.load(k_start_ptr + b).to(tl.int64) + j0
    kv_row, kv_tile, k_rope_tile = (key * H + h) * (N + V), j_s[:, None] * (H * (N + V)), j_s[:, None] * R
    mask_n, mask_r = (j < K)[:, None] & (n < N)[None, :], (j < K)[:, None] & (r < R)[None, :]
    mask_v = (j < K)[:, None] & (v < V)[None, :]
    k_nope = tl.load(kv_ptr + kv_row + kv_tile + n[None, :], mask=mask_n, other=0.0)
    value = tl.load(kv_ptr + kv_row + N + kv_tile + v[None, :], mask=mask_v, other=0.0)
    k_rope = tl.load(k_rope_ptr + key * R + k_rope_tile + r[None, :], mask=mask_r, other=0.0)
    scale_log2 = scale * 1.4426950408889634
    dk_nope, dk_rope = tl.zeros((BLOCK_K, PAD_N), tl.float32), tl.zeros((BLOCK_K, PAD_R), tl.float32)
    dvalue = tl.zeros((BLOCK_K, PAD_V), tl.float32)
    stats_row = h * T + begin
    # key j is seen by the queries from j + Q - K on
    first = max(j0 + Q - K, 0) // BLOCK_Q * BLOCK_Q
    q_tile, dout_tile = i_s[:, None] * (H * (N + R)), i_s[:, None] * (H * V)
    for i0 in range(first, first + max(Q - first, 1), BLOCK_Q):
        live = i_s < Q - i0
        row = (begin.to(tl.int64) + i0) * H + h
        q_ptrs = q_ptr + row * (N + R) + q_tile
        dout_ptrs = dout_ptr + row * V + dout_tile
        q_nope = tl.load(q_ptrs + n[None, :], mask=live[:, None] & (n < N)[None, :], other=0.0)
        q_rope = tl.load(q_ptrs + N + r[None, :], mask=live[:, None] & (r < R)[None, :], other=0.0)
        dout = tl.load(dout_ptrs + v[None, :], mask=live[:, None] & (v < V)[None, :], other=0.0)
        lse_log2 = tl.load(lse_log2_ptr + stats_row + i0 + i_s, mask=live, other=0.0)
        s = dot(k_nope, tl.trans(q_nope), tl.zeros((BLOCK_K, BLOCK_Q), tl.float32), DOT_FLOAT32)
        s = dot(k_rope, tl.trans(q_rope), s, DOT_FLOAT32)
        p = tl.exp2(s * scale_log2 - lse_log2[None, :])
        p = tl.where(j_s[:, None] <= i_s[None, :] + (i0 + K - Q - j0), p, 0.0)
        if OF_VALUES:
            dvalue = dot(p.to(dout.dtype), dout, dvalue, DOT_FLOAT32)
        else:
            delta = tl.load(delta_ptr + stats_row + i0 + i_s, mask=live, other=0.0)
            dp = dot(value, tl.trans(dout), tl.zeros((BLOCK_K, BLOCK_Q), tl.float32), DOT_FLOAT32)
            ds = (p * (dp - delta[None, :])).to(q_nope.dtype)
            dk_nope = dot(ds, q_nope, dk_nope, DOT_FLOAT32)
            dk_rope = dot(ds, q_rope, dk_rope, DOT_FLOAT32)
    dtype = dkv_ptr.dtype.element_ty
    if OF_VALUES:
        tl.store(dkv_ptr + kv_row + N + kv_tile + v[None, :], dvalue.to(dtype), mask=mask_v)
    else:
        tl.store(dkv_ptr + kv_row + kv_tile + n[None, :], (dk_nope * scale).to(dtype), mask=mask_n)
        tl.store(dk_rope_ptr + (h * S + key) * R + k_rope_tile + r[None, :], dk_rope * scale, mask=mask_r)


def _launch(
    dout: Tensor,
    q: Tensor,
    kv: Tensor,
    k_rope: Tensor,
    out: Tensor,
    lse: Tensor,
    q_start: Tensor,
    k_start: Tensor,
    k_len: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    (T, H, _), S, B = q.shape, kv.shape[0], k_len.shape[0]
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    # zeros for the keys of no sequence
    dkv = torch.zeros(kv.shape, dtype=kv.dtype, device=kv.device)
    # every head adds to the same rotary keys: each writes its own, summed below in one order, as atomics would not be.
    # In bfloat16 at the widths of DeepSeek-V3 this takes half the memory of dkv
    dk_rope = torch.zeros((H, *k_rope.shape), dtype=torch.float32, device=k_rope.device)
    if 0 in (T, H, S, B):
        return dq.zero_(), dkv, dk_rope.sum(0).to(k_rope.dtype)
    lse_log2, delta = torch.empty((2, H, T), dtype=torch.float32, device=q.device)
    for_queries, for_keys = _blocks(q, kv, k_rope)
    dout, q, kv, k_rope = dout.contiguous(), q.contiguous(), kv.contiguous(), k_rope.contiguous()
    places = q_start.contiguous(), k_start.contiguous(), k_len.contiguous()

    block_q, block_k, num_warps, num_stages = for_queries
    constants = tile_constants(q, kv, k_rope, B, block_q, block_k)
    _mla_attention_dq_kernel[(triton.cdiv(T, block_q) + B, H)](
        dout, q, kv, k_rope, out.contiguous(), lse.contiguous(), *places, dq, lse_log2, delta, scale, T, B, H,
        **constants, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    block_q, block_k, num_warps, num_stages = for_keys
    constants = tile_constants(q, kv, k_rope, B, block_q, block_k)
    for of_values in (False, True):
        _mla_attention_dkv_kernel[(triton.cdiv(S, block_k) + B, H)](
            dout, q, kv, k_rope, lse_log2, delta, *places, dkv, dk_rope, scale, T, S, B, H, OF_VALUES=of_values,
            **constants, num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
    return dq, dkv, dk_rope.sum(0).to(k_rope.dtype)


def _blocks(q: Tensor, kv: Tensor, k_rope: Tensor) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
    """Block of queries, block of keys, warps and stages: for the gradient of queries, and for that of keys or values."""
    if q.element_size() == 2 and padded_width(q, kv, k_rope) <= 320:
        # the largest that keep DeepSeek-V3's widths in registers
        return (128, 64, 8, 2), (64, 128, 8, 2)
    return (16, 32, 4, 1), (16, 32, 4, 1)


def _flash_cpu(
    dout: Tensor,
    q: Tensor,
    kv: Tensor,
    k_rope: Tensor,
    out: Tensor,
    lse: Tensor,
    q_start: Tensor,
    k_start: Tensor,
    k_len: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    (_, _, D), V = q.shape, value_width(q, kv, k_rope)
    N, width = D - k_rope.shape[1], max(D, V)
    dq, dkv, dk_rope = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (q, kv, k_rope))
    dout, q, kv, k_rope, out = (t.contiguous() for t in (dout, q, kv, k_rope, out))
    for queries, keys, masks in batches(q, q_start, k_start, k_len):
        dout_BHQD, q_BHQD, out_BHQD = (padded(take(t, *queries), width).transpose(1, 2) for t in (dout, q, out))
        k_BHKD, v_BHKD = keys_and_values(kv, k_rope, keys, D, width)
        lse_BHQ = take(lse, *queries).transpose(1, 2)
        grads = flash_attention_cpu_backward(dout_BHQD, q_BHQD, k_BHKD, v_BHKD, out_BHQD, lse_BHQ, scale, **masks)
        dq_BQHD, dk_BKHD, dv_BKHD = (t.transpose(1, 2) for t in grads)
        put(dq, *queries, dq_BQHD[..., :D])
        put(dkv, *keys, torch.cat((dk_BKHD[..., :N], dv_BKHD[..., :V]), -1))
        put(dk_rope, *keys, dk_BKHD[..., N:D].sum(2, dtype=stats_dtype(q)))
    return dq, dkv, dk_rope


def _supports(dout: Tensor, *rest: Any) -> str | None:
    return tiles_fit(*rest)


def _check(dout: Tensor, q: Tensor, kv: Tensor, k_rope: Tensor, out: Tensor, lse: Tensor, *rest: Any) -> None:
    check_arguments(q, kv, k_rope, *rest)
    T, H, V = *q.shape[:2], value_width(q, kv, k_rope)
    for t, shape in ((dout, (T, H, V)), (out, (T, H, V)), (lse, (T, H))):
        if t.ndim != len(shape) or any(map(differ, t.shape, shape)):
            raise ValueError(
                f"mla_attention_backward: want dout and out {[T, H, V]} and lse {[T, H]}, got "
                f"{[list(t.shape) for t in (dout, out, lse)]}"
            )


def _fake(dout: Tensor, q: Tensor, kv: Tensor, k_rope: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), kv.new_empty(kv.shape), k_rope.new_empty(k_rope.shape)


def _cost(dout: Tensor, q: Tensor, kv: Tensor, k_rope: Tensor, out: Tensor, lse: Tensor, *rest: Any) -> Cost:
    D, V, k_len = q.shape[2], value_width(q, kv, k_rope), rest[2]
    # three products as wide as keys: scores, dQ, dK; two as wide as values: dP, dV
    flops = attention_flops(q, kv, k_len, 3 * D + 2 * V)
    return Cost(flops=flops, bytes=2 * tensor_bytes(q, kv, k_rope, out) + tensor_bytes(lse))


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for q, kv, k_rope, *rest in sample_arguments(device, dtype):
        # any will do, there is a gradient for each; an lse of 3 is that of some twenty keys
        out = torch.randn(*q.shape[:2], value_width(q, kv, k_rope), device=device, dtype=dtype)
        lse = torch.full(q.shape[:2], 3.0, device=device, dtype=stats_dtype(q))
        yield torch.randn_like(out), q, kv, k_rope, out, lse, *rest


# sums of terms of either sign, each rounded as in the forward pass, to four times its atol: the largest are near four
TOLERANCE = {
    torch.bfloat16: Tolerance(atol=2**-6, rtol=1.6e-2),
    torch.float16: Tolerance(atol=2**-8, rtol=2e-3),
}

mla_attention_backward = define(
    "mla_attention_backward(Tensor dout, Tensor q, Tensor kv, Tensor k_rope, Tensor out, Tensor lse, Tensor q_start,"
    " Tensor k_start, Tensor k_len, float scale) -> (Tensor, Tensor, Tensor)",
    reference=mla_attention_backward_ref,
    check=_check,
    fake=_fake,
    cost=_cost,
    samples=_samples,
    tolerance=TOLERANCE,
    inline_reference=False,
)
"""Gradient of ``mla_attention``: ``(dq, dkv, dk_rope)`` from ``dout`` and what the forward call took and gave."""

mla_attention_backward.provide("torch", _flash_cpu, priority={"cpu": 5}, supports=float32_at_most)
mla_attention_backward.provide("triton", _launch, priority={"cuda": 10}, supports=_supports)

"""Multi-head latent attention over expanded keys and values, causal, for sequences of different lengths.

    k[h] = [kv[h, :N] | k_rope],  v[h] = kv[h, N:]
    out[h] = softmax(q[h] k[h]^T * scale + causal) v[h],  lse[h] = log sum exp of the masked scores

Sequence b owns queries ``q_start[b] .. q_start[b+1]`` and keys ``k_start[b] .. k_start[b] + k_len[b]``; its queries are
the last tokens of its keys. The rotary key is one head, shared by all.
Dims: T queries, S keys, B sequences, H heads, N nope width, R rotary width, V value width.
Source: DeepSeek-V3 (arXiv:2412.19437), eq. 1-11; FlashAttention-2 (arXiv:2307.08691) for the kernels.

Longer than the files of other ops: the gradient is an op of its own, and both have kernels for GPUs and for CPUs.
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
from deepfuse.ir.private import flash_attention_cpu, flash_attention_cpu_backward
from deepfuse.ir.provider import float32_at_most
from deepfuse.ir.tolerance import Tolerance


def mla_attention_ref(
    q: Tensor, kv: Tensor, k_rope: Tensor, q_start: Tensor, k_start: Tensor, k_len: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    compute = torch.promote_types(q.dtype, torch.float32)
    T, H, V = *q.shape[:2], _value_width(q, kv, k_rope)
    out, lse = q.new_zeros(T, H, V), torch.full((T, H), float("-inf"), dtype=compute, device=q.device)
    for queries, keys in sequences(q_start, k_start, k_len):
        q_HQD, k_HKD, v_HKV = (t.to(compute).transpose(0, 1) for t in _rows(q, kv, k_rope, queries, keys))
        scores_HQK = q_HQD @ k_HKD.transpose(1, 2) * scale
        scores_HQK = scores_HQK.masked_fill(~_visible(scores_HQK), float("-inf"))
        lse_HQ = scores_HQK.logsumexp(-1)
        out[queries] = ((scores_HQK - lse_HQ[..., None]).exp() @ v_HKV).transpose(0, 1).to(out.dtype)
        lse[queries] = lse_HQ.transpose(0, 1)
    return out, lse


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
    """Gradients with respect to ``q``, ``kv`` and ``k_rope`` (FlashAttention-2, arXiv:2307.08691, algorithm 2)."""
    compute = torch.promote_types(q.dtype, torch.float32)
    N = q.shape[-1] - k_rope.shape[-1]
    dq, dkv, dk_rope = torch.zeros_like(q), torch.zeros_like(kv), torch.zeros_like(k_rope)
    for queries, keys in sequences(q_start, k_start, k_len):
        q_HQD, k_HKD, v_HKV = (t.to(compute).transpose(0, 1) for t in _rows(q, kv, k_rope, queries, keys))
        dout_HQV, out_HQV = (t[queries].to(compute).transpose(0, 1) for t in (dout, out))
        scores_HQK = q_HQD @ k_HKD.transpose(1, 2) * scale
        p_HQK = (scores_HQK - lse[queries].transpose(0, 1)[..., None]).exp()
        p_HQK = p_HQK.masked_fill(~_visible(p_HQK), 0.0)
        dp_HQK = dout_HQV @ v_HKV.transpose(1, 2)
        ds_HQK = p_HQK * (dp_HQK - (dout_HQV * out_HQV).sum(-1, keepdim=True)) * scale
        dk_HKD = ds_HQK.transpose(1, 2) @ q_HQD
        dq[queries] = (ds_HQK @ k_HKD).transpose(0, 1).to(dq.dtype)
        dkv[keys] = torch.cat((dk_HKD[..., :N], p_HQK.transpose(1, 2) @ dout_HQV), -1).transpose(0, 1).to(dkv.dtype)
        dk_rope[keys] = dk_HKD[..., N:].sum(0).to(dk_rope.dtype)
    return dq, dkv, dk_rope


def sequences(q_start: Tensor, k_start: Tensor, k_len: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows of the queries and of the keys of each sequence that has queries."""
    starts = q_start.tolist()
    for begin, end, key, length in zip(starts[:-1], starts[1:], k_start.tolist(), k_len.tolist(), strict=True):
        if end > begin:
            yield slice(begin, end), slice(key, key + length)


def _rows(q: Tensor, kv: Tensor, k_rope: Tensor, queries: slice, keys: slice) -> tuple[Tensor, Tensor, Tensor]:
    N = q.shape[-1] - k_rope.shape[-1]
    kv_KHD = kv[keys]
    k_rope_KHR = k_rope[keys].unsqueeze(1).expand(-1, kv.shape[1], -1)
    return q[queries], torch.cat((kv_KHD[..., :N], k_rope_KHR), -1), kv_KHD[..., N:]


def _visible(scores: Tensor) -> Tensor:
    """``[Q, K]`` mask of the keys a query sees: those up to its own place, the queries being the last keys."""
    Q, K = scores.shape[-2:]
    return torch.ones(Q, K, dtype=torch.bool, device=scores.device).tril(K - Q)


def _value_width(q: Tensor, kv: Tensor, k_rope: Tensor) -> int:
    return kv.shape[-1] - (q.shape[-1] - k_rope.shape[-1])


@triton.jit
def _query_block(q_start_ptr, k_start_ptr, k_len_ptr, T, B, BLOCK_B: tl.constexpr, BLOCK_Q: tl.constexpr):
    """Sequence and block of queries of this program: ``begin, Q`` its queries, ``key, K`` its keys, ``i0`` the block.

    Sequence b is served from program ``q_start[b] // BLOCK_Q + b`` on, which leaves each at least as many programs as
    it has blocks; programs to spare find ``i0 >= Q``. Rows behind the last sequence are one more, without keys.
    """
    # blocks of late queries see the most keys: they start first
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    bs = tl.arange(0, BLOCK_B)
    starts = tl.load(q_start_ptr + bs, mask=bs <= B, other=0)
    b = tl.sum(((starts // BLOCK_Q + bs <= program) & (bs <= B)).to(tl.int32), 0) - 1
    begin = tl.load(q_start_ptr + b).to(tl.int32)
    end = tl.load(q_start_ptr + b + 1, mask=b < B, other=T).to(tl.int32)
    key = tl.load(k_start_ptr + b, mask=b < B, other=0).to(tl.int64)
    K = tl.load(k_len_ptr + b, mask=b < B, other=0).to(tl.int32)
    return begin.to(tl.int64), end - begin, key, K, (program - begin // BLOCK_Q - b) * BLOCK_Q


@triton.jit
def _dot(a, b, acc, DOT_FLOAT32: tl.constexpr):
    if DOT_FLOAT32:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit(do_not_specialize=["T", "B"])
def _mla_attention_kernel(
    q_ptr, kv_ptr, k_rope_ptr, q_start_ptr, k_start_ptr, k_len_ptr, out_ptr, lse_ptr, scale, T, B, H: tl.constexpr,
    N: tl.constexpr, R: tl.constexpr, V: tl.constexpr, PAD_N: tl.constexpr, PAD_R: tl.constexpr, PAD_V: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, DOT_FLOAT32: tl.constexpr,
):  # fmt: skip
    """One program per block of queries and head: online softmax over the blocks of keys they see."""
    begin, Q, key, K, i0 = _query_block(q_start_ptr, k_start_ptr, k_len_ptr, T, B, BLOCK_B, BLOCK_Q)
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
        s = _dot(q_nope, tl.trans(k_nope), tl.zeros((BLOCK_Q, BLOCK_K), tl.float32), DOT_FLOAT32)
        s = _dot(q_rope, tl.trans(k_rope), s, DOT_FLOAT32) * scale_log2
        if j0 + BLOCK_K > i0 + K - Q + 1:  # on the diagonal; blocks before it are seen whole
            s = tl.where(j_s[None, :] <= i_s[:, None] + (i0 + K - Q - j0), s, float("-inf"))
        m_next = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - m_next[:, None])
        shrink = tl.exp2(m - m_next)
        denominator = denominator * shrink + tl.sum(p, 1)
        acc = _dot(p.to(value.dtype), value, acc * shrink[:, None], DOT_FLOAT32)
        m = m_next
    out = acc / tl.where(denominator == 0.0, 1.0, denominator)[:, None]
    out_ptrs = out_ptr + row * V + i_s[:, None] * (H * V) + v[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=(i < Q)[:, None] & (v < V)[None, :])
    tl.store(lse_ptr + row + i_s * H, (m + tl.log2(denominator)) * 0.6931471805599453, mask=i < Q)


@triton.jit(do_not_specialize=["T", "B"])
def _mla_attention_dq_kernel(
    dout_ptr, q_ptr, kv_ptr, k_rope_ptr, out_ptr, lse_ptr, q_start_ptr, k_start_ptr, k_len_ptr, dq_ptr, lse_log2_ptr,
    delta_ptr, scale, T, B, H: tl.constexpr,
    N: tl.constexpr, R: tl.constexpr, V: tl.constexpr, PAD_N: tl.constexpr, PAD_R: tl.constexpr, PAD_V: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, DOT_FLOAT32: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of queries of one head, and ``delta = rowsum(dout * out)`` for the kernel after it."""
    begin, Q, key, K, i0 = _query_block(q_start_ptr, k_start_ptr, k_len_ptr, T, B, BLOCK_B, BLOCK_Q)
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
        s = _dot(q_nope, tl.trans(k_nope), tl.zeros((BLOCK_Q, BLOCK_K), tl.float32), DOT_FLOAT32)
        s = _dot(q_rope, tl.trans(k_rope), s, DOT_FLOAT32)
        p = tl.exp2(s * scale_log2 - lse_log2[:, None])
        if j0 + BLOCK_K > i0 + K - Q + 1:
            p = tl.where(j_s[None, :] <= i_s[:, None] + (i0 + K - Q - j0), p, 0.0)
        dp = _dot(dout, tl.trans(value), tl.zeros((BLOCK_Q, BLOCK_K), tl.float32), DOT_FLOAT32)
        ds = (p * (dp - delta[:, None])).to(k_nope.dtype)
        dq_nope = _dot(ds, k_nope, dq_nope, DOT_FLOAT32)
        dq_rope = _dot(ds, k_rope, dq_rope, DOT_FLOAT32)
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
        s = _dot(k_nope, tl.trans(q_nope), tl.zeros((BLOCK_K, BLOCK_Q), tl.float32), DOT_FLOAT32)
        s = _dot(k_rope, tl.trans(q_rope), s, DOT_FLOAT32)
        p = tl.exp2(s * scale_log2 - lse_log2[None, :])
        p = tl.where(j_s[:, None] <= i_s[None, :] + (i0 + K - Q - j0), p, 0.0)
        if OF_VALUES:
            dvalue = _dot(p.to(dout.dtype), dout, dvalue, DOT_FLOAT32)
        else:
            delta = tl.load(delta_ptr + stats_row + i0 + i_s, mask=live, other=0.0)
            dp = _dot(value, tl.trans(dout), tl.zeros((BLOCK_K, BLOCK_Q), tl.float32), DOT_FLOAT32)
            ds = (p * (dp - delta[None, :])).to(q_nope.dtype)
            dk_nope = _dot(ds, q_nope, dk_nope, DOT_FLOAT32)
            dk_rope = _dot(ds, q_rope, dk_rope, DOT_FLOAT32)
    dtype = dkv_ptr.dtype.element_ty
    if OF_VALUES:
        tl.store(dkv_ptr + kv_row + N + kv_tile + v[None, :], dvalue.to(dtype), mask=mask_v)
    else:
        tl.store(dkv_ptr + kv_row + kv_tile + n[None, :], (dk_nope * scale).to(dtype), mask=mask_n)
        tl.store(dk_rope_ptr + (h * S + key) * R + k_rope_tile + r[None, :], dk_rope * scale, mask=mask_r)


def _widths(q: Tensor, kv: Tensor, k_rope: Tensor) -> dict[str, int]:
    widths = {"N": q.shape[2] - k_rope.shape[1], "R": k_rope.shape[1], "V": _value_width(q, kv, k_rope)}
    # tl.dot wants powers of two, 16 at least
    return widths | {f"PAD_{name}": max(triton.next_power_of_2(width), 16) for name, width in widths.items()}


def _padded_width(widths: dict[str, int]) -> int:
    return widths["PAD_N"] + widths["PAD_R"] + widths["PAD_V"]


def _constants(B: int, block_q: int, block_k: int) -> dict[str, Any]:
    return {
        "BLOCK_B": triton.next_power_of_2(B + 1),
        "BLOCK_Q": block_q,
        "BLOCK_K": block_k,
        "DOT_FLOAT32": interpreted(),
    }


def _launch(
    q: Tensor, kv: Tensor, k_rope: Tensor, q_start: Tensor, k_start: Tensor, k_len: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    (T, H, _), B = q.shape, k_len.shape[0]
    out = torch.empty((T, H, _value_width(q, kv, k_rope)), dtype=q.dtype, device=q.device)
    lse = torch.empty((T, H), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    widths = _widths(q, kv, k_rope)
    if q.element_size() == 4 or _padded_width(widths) > 320:
        block_q, block_k, num_warps, num_stages = 32, 32, 4, 1
    elif T > 64 * B:
        # two warpgroups of 64 rows; at the widths of DeepSeek-V3 215 registers and 168 KiB of shared memory
        block_q, block_k, num_warps, num_stages = 128, 64, 8, 3
    else:
        block_q, block_k, num_warps, num_stages = (64 if T > 16 * B else 16), 64, 4, 2
    _mla_attention_kernel[(triton.cdiv(T, block_q) + B, H)](
        *(t.contiguous() for t in (q, kv, k_rope, q_start, k_start, k_len)), out, lse, scale, T, B, H,
        **widths, **_constants(B, block_q, block_k), num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return out, lse


def _launch_backward(
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
    stats = torch.empty((2, H, T), dtype=torch.float32, device=q.device)
    widths = _widths(q, kv, k_rope)
    narrow = q.element_size() == 2 and _padded_width(widths) <= 320
    # block of queries, block of keys, warps, stages; the largest that keep DeepSeek-V3's widths in registers
    for_queries = (128, 64, 8, 2) if narrow else (16, 32, 4, 1)
    for_keys = (64, 128, 8, 2) if narrow else (16, 32, 4, 1)
    for_values = (64, 128, 8, 2) if narrow else (16, 32, 4, 1)
    dout, q, kv, k_rope = dout.contiguous(), q.contiguous(), kv.contiguous(), k_rope.contiguous()
    places = q_start.contiguous(), k_start.contiguous(), k_len.contiguous()

    block_q, block_k, num_warps, num_stages = for_queries
    _mla_attention_dq_kernel[(triton.cdiv(T, block_q) + B, H)](
        dout, q, kv, k_rope, out.contiguous(), lse.contiguous(), *places, dq, *stats, scale, T, B, H,
        **widths, **_constants(B, block_q, block_k), num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    for of_values, (block_q, block_k, num_warps, num_stages) in ((False, for_keys), (True, for_values)):
        _mla_attention_dkv_kernel[(triton.cdiv(S, block_k) + B, H)](
            dout, q, kv, k_rope, *stats, *places, dkv, dk_rope, scale, T, S, B, H, OF_VALUES=of_values,
            **widths, **_constants(B, block_q, block_k), num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
    return dq, dkv, dk_rope.sum(0).to(k_rope.dtype)


def _batches(
    q: Tensor, q_start: Tensor, k_start: Tensor, k_len: Tensor
) -> Iterator[tuple[tuple[list[int], int], tuple[list[int], int], dict[str, Any]]]:
    """First rows and length of the queries, those of the keys, and the masking, of all sequences of equal lengths."""
    alike: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for queries, keys in sequences(q_start, k_start, k_len):
        if keys.stop > keys.start:
            lengths = queries.stop - queries.start, keys.stop - keys.start
            alike.setdefault(lengths, []).append((queries.start, keys.start))
    for (Q, K), firsts in alike.items():
        mask = None
        if 1 < Q < K:
            mask = q.new_zeros(Q, K)
            mask.masked_fill_(~_visible(mask), float("-inf"))
        yield ([f for f, _ in firsts], Q), ([f for _, f in firsts], K), {"causal": 1 < Q == K, "mask": mask}


def _keys_and_values(
    kv: Tensor, k_rope: Tensor, keys: tuple[list[int], int], D: int, width: int
) -> tuple[Tensor, Tensor]:
    """``[B, H, K, width]`` keys and values, padded with zeros: the fused attention wants both equally wide."""
    kv_BKHX, k_rope_BKR = _take(kv, *keys), _take(k_rope, *keys)
    N = D - k_rope.shape[1]
    k_rope_BKHR = k_rope_BKR.unsqueeze(2).expand(-1, -1, kv.shape[1], -1)
    k_BKHD = _padded(torch.cat((kv_BKHX[..., :N], k_rope_BKHR), -1), width)
    return k_BKHD.transpose(1, 2), _padded(kv_BKHX[..., N:], width).transpose(1, 2)


def _take(x: Tensor, firsts: list[int], length: int) -> Tensor:
    """Rows ``first .. first + length`` of ``x`` for each of ``firsts``, stacked; a view where they are neighbours."""
    if _neighbours(firsts, length):
        return x[firsts[0] : firsts[0] + len(firsts) * length].unflatten(0, (-1, length))
    return torch.stack([x[first : first + length] for first in firsts])


def _put(x: Tensor, firsts: list[int], length: int, rows: Tensor) -> None:
    if _neighbours(firsts, length):
        _take(x, firsts, length).copy_(rows)
        return
    for first, part in zip(firsts, rows, strict=True):
        x[first : first + length] = part


def _neighbours(firsts: list[int], length: int) -> bool:
    return firsts == list(range(firsts[0], firsts[0] + len(firsts) * length, length))


def _padded(x: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x


def _stats_dtype(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _flash_cpu(
    q: Tensor, kv: Tensor, k_rope: Tensor, q_start: Tensor, k_start: Tensor, k_len: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """PyTorch's fused attention on a CPU, one call for all sequences of the same lengths."""
    (T, H, D), V = q.shape, _value_width(q, kv, k_rope)
    q, kv, k_rope = q.contiguous(), kv.contiguous(), k_rope.contiguous()  # other strides give wrong numbers
    out, lse = q.new_zeros(T, H, V), q.new_full((T, H), float("-inf"), dtype=_stats_dtype(q))
    width = max(D, V)
    for queries, keys, masks in _batches(q, q_start, k_start, k_len):
        q_BHQD = _padded(_take(q, *queries), width).transpose(1, 2)
        k_BHKD, v_BHKD = _keys_and_values(kv, k_rope, keys, D, width)
        out_BHQD, lse_BHQ = flash_attention_cpu(q_BHQD, k_BHKD, v_BHKD, scale, **masks)
        _put(out, *queries, out_BHQD.transpose(1, 2)[..., :V])
        _put(lse, *queries, lse_BHQ.transpose(1, 2))
    return out, lse


def _flash_cpu_backward(
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
    (_, _, D), V = q.shape, _value_width(q, kv, k_rope)
    N, width = D - k_rope.shape[1], max(D, V)
    dq, dkv, dk_rope = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (q, kv, k_rope))
    dout, q, kv, k_rope, out = (t.contiguous() for t in (dout, q, kv, k_rope, out))
    for queries, keys, masks in _batches(q, q_start, k_start, k_len):
        dout_BHQD, q_BHQD, out_BHQD = (_padded(_take(t, *queries), width).transpose(1, 2) for t in (dout, q, out))
        k_BHKD, v_BHKD = _keys_and_values(kv, k_rope, keys, D, width)
        lse_BHQ = _take(lse, *queries).transpose(1, 2)
        grads = flash_attention_cpu_backward(dout_BHQD, q_BHQD, k_BHKD, v_BHKD, out_BHQD, lse_BHQ, scale, **masks)
        dq_BQHD, dk_BKHD, dv_BKHD = (t.transpose(1, 2) for t in grads)
        _put(dq, *queries, dq_BQHD[..., :D])
        _put(dkv, *keys, torch.cat((dk_BKHD[..., :N], dv_BKHD[..., :V]), -1))
        _put(dk_rope, *keys, dk_BKHD[..., N:D].sum(2, dtype=_stats_dtype(q)))
    return dq, dkv, dk_rope


def _fits(q: Tensor, kv: Tensor, k_rope: Tensor, *rest: Any) -> str | None:
    width = _padded_width(_widths(q, kv, k_rope)) * q.element_size()
    if width > 2560:
        return f"32 queries and keys must fit shared memory: at most 2560 bytes a head (padded), not {width}"
    return float32_at_most(q)


def _backward_fits(dout: Tensor, *rest: Any) -> str | None:
    return _fits(*rest)


def _check(
    q: Tensor, kv: Tensor, k_rope: Tensor, q_start: Tensor, k_start: Tensor, k_len: Tensor, scale: float
) -> None:
    if (
        q.ndim != 3
        or kv.ndim != 3
        or k_rope.ndim != 2
        or q.shape[1] != kv.shape[1]
        or not k_rope.shape[1] < q.shape[2]
        or not q.shape[2] - k_rope.shape[1] < kv.shape[2]
        or any(t.ndim != 1 for t in (q_start, k_start, k_len))
    ):
        raise ValueError(
            "mla_attention: want q [T, H, N + R], kv [S, H, N + V], k_rope [S, R], q_start [B + 1], k_start [B] and "
            f"k_len [B], got {[list(t.shape) for t in (q, kv, k_rope, q_start, k_start, k_len)]}"
        )
    if not q.dtype == kv.dtype == k_rope.dtype:
        raise TypeError(
            f"mla_attention: want q, kv and k_rope of one dtype, got {q.dtype}, {kv.dtype} and {k_rope.dtype}"
        )


def _fake(
    q: Tensor, kv: Tensor, k_rope: Tensor, q_start: Tensor, k_start: Tensor, k_len: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:2], _value_width(q, kv, k_rope)), q.new_empty(q.shape[:2], dtype=_stats_dtype(q))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, kv, k_rope, q_start, k_start, k_len, ctx.scale = inputs
    ctx.save_for_backward(q, kv, k_rope, *output, q_start, k_start, k_len)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dout: Tensor, dlse: Any) -> tuple[Any, ...]:
    grads = mla_attention_backward(dout, *ctx.saved_tensors, ctx.scale)
    return *grads, None, None, None, None


def _cost(q: Tensor, kv: Tensor, k_rope: Tensor, q_start: Tensor, k_start: Tensor, k_len: Tensor, scale: float) -> Cost:
    T, H, D = q.shape
    V, B = _value_width(q, kv, k_rope), k_len.shape[0]
    # lengths are values, which a cost may not read: queries and keys are taken as spread evenly over the sequences
    pairs = T * kv.shape[0] // max(B, 1) if isinstance(B, int) else T * kv.shape[0] // B
    causal = 2 if T is kv.shape[0] or T == kv.shape[0] else 1
    return Cost(flops=2 * pairs * H * (D + V) // causal, bytes=tensor_bytes(q, kv, k_rope) + T * H * V * q.itemsize)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    # (queries, keys) of each sequence; H, N, R, V
    for lengths, H, N, R, V in [
        ([(3, 3)], 2, 8, 4, 8),
        ([(1, 1), (5, 5), (0, 0), (17, 17)], 3, 16, 8, 12),  # uneven, one of them empty
        ([(1, 9), (4, 20)], 1, 8, 8, 16),  # fewer queries than keys; values wider than keys' nope part
        ([(40, 40), (70, 70)], 2, 32, 16, 32),
    ]:
        queries, keys = [q for q, _ in lengths], [k for _, k in lengths]
        T, S = sum(queries), sum(keys)
        starts = torch.tensor([0, *keys], device=device).cumsum(0)[:-1].to(torch.int32)
        yield (
            torch.randn(T, H, N + R, device=device, dtype=dtype),
            torch.randn(S, H, N + V, device=device, dtype=dtype),
            torch.randn(S, R, device=device, dtype=dtype),
            torch.tensor([0, *queries], device=device).cumsum(0).to(torch.int32),
            starts,
            torch.tensor(keys, device=device, dtype=torch.int32),
            (N + R) ** -0.5,
        )


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
    check=_check,
    fake=_fake,
    cost=_cost,
    samples=_samples,
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


def _backward_check(dout: Tensor, q: Tensor, kv: Tensor, k_rope: Tensor, out: Tensor, lse: Tensor, *rest: Any) -> None:
    _check(q, kv, k_rope, *rest)
    if dout.shape != out.shape:
        raise ValueError(
            f"mla_attention_backward: want dout and out of one shape, got {list(dout.shape)} and {list(out.shape)}"
        )


def _backward_fake(dout: Tensor, q: Tensor, kv: Tensor, k_rope: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), kv.new_empty(kv.shape), k_rope.new_empty(k_rope.shape)


def _backward_cost(dout: Tensor, q: Tensor, kv: Tensor, k_rope: Tensor, out: Tensor, lse: Tensor, *rest: Any) -> Cost:
    forward = _cost(q, kv, k_rope, *rest)
    # five products of the forward's two: scores again, dP, dV, dQ, dK
    return Cost(flops=forward.flops * 5 // 2, bytes=2 * tensor_bytes(q, kv, k_rope, out) + tensor_bytes(lse))


def _backward_samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for args in _samples(device, dtype):
        out, lse = mla_attention_ref(*args)
        yield torch.randn_like(out), *args[:3], out, lse, *args[3:]


# sums of terms of either sign, each rounded as in the forward pass; the largest are near four
BACKWARD_TOLERANCE = {dtype: Tolerance(atol=4 * t.atol, rtol=t.rtol) for dtype, t in TOLERANCE.items()}

mla_attention_backward = define(
    "mla_attention_backward(Tensor dout, Tensor q, Tensor kv, Tensor k_rope, Tensor out, Tensor lse, Tensor q_start,"
    " Tensor k_start, Tensor k_len, float scale) -> (Tensor, Tensor, Tensor)",
    reference=mla_attention_backward_ref,
    check=_backward_check,
    fake=_backward_fake,
    cost=_backward_cost,
    samples=_backward_samples,
    tolerance=BACKWARD_TOLERANCE,
    inline_reference=False,
)
"""Gradient of ``mla_attention``: ``(dq, dkv, dk_rope)`` from ``dout`` and what the forward call took and gave."""

mla_attention.provide("torch", _flash_cpu, priority={"cpu": 5}, supports=float32_at_most)
mla_attention_backward.provide("torch", _flash_cpu_backward, priority={"cpu": 5}, supports=float32_at_most)
mla_attention.provide("triton", _launch, priority={"cuda": 10}, supports=_fits)
mla_attention_backward.provide("triton", _launch_backward, priority={"cuda": 10}, supports=_backward_fits)

"""Multi-head latent attention over expanded keys and values, causal, for sequences of different lengths.

    k[h] = [kv[h, :N] | k_rope],  v[h] = kv[h, N:]
    out[h] = softmax(q[h] k[h]^T * scale + causal) v[h],  lse[h] = log sum exp of the masked scores

Sequence b owns queries ``q_start[b] .. q_start[b+1]`` and keys ``k_start[b] .. k_start[b] + k_len[b]``; its queries are
the last tokens of its keys. The rotary key is one head, shared by all.
Dims: T queries, S keys, B sequences, H heads, N nope width, R rotary width, V value width.
Source: DeepSeek-V3 (arXiv:2412.19437), eq. 1-11.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from deepfuse.ir.cost import Cost, tensor_bytes
from deepfuse.ir.op import define
from deepfuse.ir.private import flash_attention_cpu, flash_attention_cpu_backward


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


def _flash_cpu(
    q: Tensor, kv: Tensor, k_rope: Tensor, q_start: Tensor, k_start: Tensor, k_len: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """PyTorch's fused attention on a CPU, one call for all sequences of the same lengths."""
    (T, H, D), V = q.shape, _value_width(q, kv, k_rope)
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


def _batches(
    q: Tensor, q_start: Tensor, k_start: Tensor, k_len: Tensor
) -> Iterator[tuple[tuple[list[int], int], tuple[list[int], int], dict[str, Any]]]:
    """First rows and length of the queries, those of the keys, and the masking, of all sequences of equal lengths."""
    alike: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for queries, keys in sequences(q_start, k_start, k_len):
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
    if firsts == list(range(firsts[0], firsts[0] + len(firsts) * length, length)):
        return x[firsts[0] : firsts[0] + len(firsts) * length].unflatten(0, (-1, length))
    return torch.stack([x[first : first + length] for first in firsts])


def _put(x: Tensor, firsts: list[int], length: int, rows: Tensor) -> None:
    for first, part in zip(firsts, rows, strict=True):
        x[first : first + length] = part


def _padded(x: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x


def _stats_dtype(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _float32_at_most(*args: Any) -> str | None:
    return "computes in float32 at most" if args[0].dtype == torch.float64 else None


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


def _cost(
    q: Tensor, kv: Tensor, k_rope: Tensor, q_start: Tensor, k_start: Tensor, k_len: Tensor, scale: float
) -> Cost:
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


mla_attention = define(
    "mla_attention(Tensor q, Tensor kv, Tensor k_rope, Tensor q_start, Tensor k_start, Tensor k_len, float scale)"
    " -> (Tensor, Tensor)",
    reference=mla_attention_ref,
    check=_check,
    fake=_fake,
    cost=_cost,
    samples=_samples,
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


def _backward_cost(
    dout: Tensor, q: Tensor, kv: Tensor, k_rope: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> Cost:
    forward = _cost(q, kv, k_rope, *rest)
    # five products of the forward's two: scores again, dP, dV, dQ, dK
    return Cost(flops=forward.flops * 5 // 2, bytes=2 * tensor_bytes(q, kv, k_rope, out) + tensor_bytes(lse))


def _backward_samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for args in _samples(device, dtype):
        out, lse = mla_attention_ref(*args)
        yield torch.randn_like(out), *args[:3], out, lse, *args[3:]


mla_attention_backward = define(
    "mla_attention_backward(Tensor dout, Tensor q, Tensor kv, Tensor k_rope, Tensor out, Tensor lse, Tensor q_start,"
    " Tensor k_start, Tensor k_len, float scale) -> (Tensor, Tensor, Tensor)",
    reference=mla_attention_backward_ref,
    check=_backward_check,
    fake=_backward_fake,
    cost=_backward_cost,
    samples=_backward_samples,
    inline_reference=False,
)
"""Gradient of ``mla_attention``: ``(dq, dkv, dk_rope)`` from ``dout`` and what the forward call took and gave."""

mla_attention.provide("torch", _flash_cpu, priority={"cpu": 5}, supports=_float32_at_most)
mla_attention_backward.provide("torch", _flash_cpu_backward, priority={"cpu": 5}, supports=_float32_at_most)

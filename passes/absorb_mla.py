"""Attend in latent space where that is cheaper: decode does not expand the cache.

    before:  kv = linear(gather_latent(cache)[:C], kv_b_proj);  out = mla_attention([q_nope | q_rope], kv, k_rope, ...)
    after:   out = head_matmul(mla_decode(head_matmul(q_nope, W_UK), q_rope, cache, ...), W_UV)

A cache in FP8 is read by ``gather_latent_fp8`` before, and by ``mla_decode_fp8`` after.

Why: expanding reads and multiplies every cached token by ``kv_b_proj`` at every step; absorbed, the step reads C + R
numbers a token, whatever the number of heads.
Requires: one query a sequence, keys from the cache; the cost model must find it cheaper. Never in training,
where there is no cache.
Numerics: reassociating; ``(W_UK^T q) . c`` for ``q . (W_UK c)``. An FP8 ``kv_b_proj`` is dequantized to the model's dtype
in the step (1 byte read and 2 written a number; a copy kept would take back what FP8 saves), on a GPU within the products
(``fuse_decode_attention``); and the latent is not rounded to FP8, as the expanded form does before its product: attention
stays in high precision.
"""

import operator
from typing import Any

import torch
from torch import fx

from deepfuse.ir.cost import Cost
from deepfuse.ir.device import Device
from deepfuse.ir.printer import where
from deepfuse.ops.append_latent import PAGE_SIZE
from deepfuse.ops.dequantize import dequantize
from deepfuse.ops.gather_latent import gather_latent
from deepfuse.ops.gather_latent_fp8 import gather_latent_fp8
from deepfuse.ops.head_matmul import head_matmul
from deepfuse.ops.linear import linear
from deepfuse.ops.mla_attention import mla_attention
from deepfuse.ops.mla_decode import mla_decode
from deepfuse.ops.mla_decode_fp8 import mla_decode_fp8
from deepfuse.ops.quantize import quantize
from deepfuse.passes.journal import note
from deepfuse.passes.match import CAST, RESHAPES
from deepfuse.passes.record import graph_pass
from deepfuse.passes.splice import call, values

aten = torch.ops.aten
ABSORBED = {
    gather_latent.overload: (gather_latent, mla_decode),
    gather_latent_fp8.overload: (gather_latent_fp8, mla_decode_fp8),
}
"""What reads a cache, expanded and absorbed, by the former's overload."""
_SAME_VALUES = RESHAPES | {aten.alias.default}


@graph_pass(stage="semantic", kind="reassociating")
def absorb_mla(graph: fx.Graph, *, device: Device, max_seq_len: int) -> int:
    """Rewrite in place; returns the number of attentions absorbed. Costs are taken at half of ``max_seq_len``."""
    absorbed = 0
    for attention in graph.find_nodes(op="call_function", target=mla_attention.overload):
        site = _decode_site(attention)
        if isinstance(site, str):
            note(f"{where(attention)}: expanded: {site}")
            continue
        expand_us, absorb_us = _predict(attention, site, device, max_seq_len // 2)
        text = f"predicted {absorb_us:.1f} us, or {expand_us:.1f} us expanded, at {max_seq_len // 2} tokens"
        if absorb_us >= expand_us:
            note(f"{where(attention)}: left expanded; absorbed {text}")
            continue
        note(f"{where(attention)}: absorbed; {text}")
        _absorb(graph, attention, **site)
        absorbed += 1
    return absorbed


def _decode_site(attention: fx.Node) -> dict[str, Any] | str:
    """The nodes around an attention over gathered pages with one query a sequence, or why it is none."""
    args: Any = attention.args
    q, kv, k_rope, q_start, k_start, k_len, _ = args
    expand = _expansion(kv)
    if expand.target is not linear.overload or expand.args[2] is not None:
        return "keys do not come straight from a linear layer without bias"
    latent, weight, _ = expand.args
    parts = [_getitem_source(n) for n in (_behind_views(_before_rounding(latent)), _behind_views(k_rope))]
    if parts[0] is None or parts[0][0].target is not aten.split_with_sizes.default:
        return "keys come from the tokens of the call, not from the cache"
    split = parts[0][0]
    if parts != [(split, 0), (split, 1)]:
        return "latent and rotary key are not the two parts of one row"
    rows = _getitem_source(split.args[0])
    if rows is None or rows[0].target not in ABSORBED or _getitem_source(k_start) != (rows[0], 1):
        return "keys come from the tokens of the call, not from the cache"
    block_table = rows[0].args[1]
    queries = q.meta["val"].shape[0]
    if queries != block_table.meta["val"].shape[0] or not _counts_up(q_start, queries + 1):
        return "several queries a sequence"
    if any(user.args[1] != 0 for user in attention.users if user.users):
        return "the statistics of the softmax are read"
    return {"q": q, "weight": weight, "gather": rows[0], "seqlens": k_len}


def _absorb(
    graph: fx.Graph,
    attention: fx.Node,
    q: fx.Node,
    weight: fx.Node,
    gather: Any,
    seqlens: fx.Node,
) -> None:
    H, C, N, R, V = _dims(attention)
    decode, (cache, block_table) = ABSORBED[gather.target][1], gather.args[:2]
    with graph.inserting_before(attention):
        q_nope, q_rope = _parts_of(graph, attention, q, N, R)
        dtype = q.meta["val"].dtype
        if weight.target is dequantize.overload:
            weight = call(graph, attention, dequantize.overload, *weight.args[:-1], dtype)
        per_head = call(graph, attention, aten.view.default, weight, [H, N + V, C])
        w_uk = call(graph, attention, aten.slice.Tensor, per_head, 1, 0, N)
        w_uv = call(graph, attention, aten.slice.Tensor, per_head, 1, N, N + V)
        w_uv = call(graph, attention, aten.permute.default, w_uv, [0, 2, 1])
        q_latent = call(graph, attention, head_matmul.overload, q_nope, w_uk)
        scale = attention.args[-1]
        mixed = call(graph, attention, decode.overload, q_latent, q_rope, cache, block_table, seqlens, scale)
        new = call(graph, attention, head_matmul.overload, mixed, w_uv)
    for user in list(attention.users):
        user.replace_all_uses_with(new)
        graph.erase_node(user)
    graph.erase_node(attention)


def _parts_of(graph: fx.Graph, attention: fx.Node, q: fx.Node, N: int, R: int) -> list[fx.Node]:
    """Nope and rotary part of the queries; those they were put together from, where they were."""
    args: Any = q.args
    together = q.target is aten.cat.default and len(args) > 1 and args[1] % q.meta["val"].ndim == 2
    if together and [part.meta["val"].shape[2] for part in args[0]] == [N, R]:
        return list(args[0])
    bounds = ((0, N), (N, N + R))
    return [call(graph, attention, aten.slice.Tensor, q, 2, begin, end) for begin, end in bounds]


def _predict(attention: fx.Node, site: dict[str, Any], device: Device, tokens: int) -> tuple[float, float]:
    """Microseconds of the expanded and of the absorbed step with ``tokens`` cached tokens a sequence."""
    H, C, N, R, V = _dims(attention)
    B = int(site["q"].meta["val"].shape[0])
    dtype = site["q"].meta["val"].dtype

    def meta(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    gather, decode = ABSORBED[site["gather"].target]
    stored, gathered = site["gather"].args[0].meta["val"], site["gather"].args[2:]
    index = torch.empty(B, -(-tokens // PAGE_SIZE), dtype=torch.int64, device="meta")
    S = index.numel() * PAGE_SIZE
    lengths = torch.empty(B, dtype=torch.int32, device="meta")
    q, kv_b = meta(B, H, N + R), meta(H * (N + V), C)
    cache = torch.empty(index.numel() + 1, *stored.shape[1:], dtype=stored.dtype, device="meta")
    expand = (
        gather.cost(cache, index, *gathered)
        + linear.cost(meta(S, C), kv_b, None)
        + mla_attention.cost(q, meta(S, H, N + V), meta(S, R), lengths, lengths, lengths, 1.0)
    )
    absorb = (
        head_matmul.cost(q[..., :N], meta(H, N, C))
        + decode.cost(meta(B, H, C), q[..., N:], cache, index, lengths, 1.0)
        + head_matmul.cost(meta(B, H, C), meta(H, C, V))
    )
    if site["weight"].target is dequantize.overload:
        arguments: Any = values(list(site["weight"].args[:-1]))
        absorb = absorb + dequantize.cost(*arguments, dtype)
    return _us(expand, device, dtype), _us(absorb, device, dtype)


def _us(cost: Cost, device: Device, dtype: torch.dtype) -> float:
    return device.seconds(cost, dtype) * 1e6


def _dims(attention: fx.Node) -> tuple[int, int, int, int, int]:
    """H, C, N, R, V."""
    args: Any = attention.args
    q, kv, k_rope = (a.meta["val"] for a in args[:3])
    R = k_rope.shape[-1]
    N = q.shape[-1] - R
    expand = _expansion(args[1])
    return q.shape[1], expand.args[0].meta["val"].shape[-1], N, R, kv.shape[-1] - N


def _expansion(kv: Any) -> Any:
    """The linear layer that keys and values come from; in FP8 its result is rounded to the model's dtype."""
    node = _behind_views(kv)
    return _behind_views(node.args[0]) if node.target is CAST else node


def _before_rounding(x: Any) -> Any:
    """What an FP8 product rounds first; ``x`` itself where it does not."""
    if x.target is not dequantize.overload:
        return x
    rounded = _getitem_source(x.args[0])
    return x if rounded is None or rounded[0].target is not quantize.overload else rounded[0].args[0]


def _behind_views(node: Any) -> Any:
    while node.target in _SAME_VALUES:
        node = node.args[0]
    return node


def _getitem_source(node: Any) -> tuple[Any, int] | None:
    return (node.args[0], node.args[1]) if node.target is operator.getitem else None


def _counts_up(node: Any, length: Any) -> bool:
    """Whether the node is ``0, 1, 2, ...`` of that length."""
    if node.target is aten.arange.default:
        return node.args[0] == length
    if node.target is aten.arange.start_step:
        return tuple(node.args[:2]) == (0, length) and (len(node.args) < 3 or node.args[2] == 1)
    if node.target is torch.ops.prims.iota.default:
        return node.args[0] == length and node.kwargs.get("start") == 0 and node.kwargs.get("step") == 1
    return False

"""Expanded attention over the cache becomes absorbed attention, where and only where it should."""

import pytest
import torch

from deepfuse.ir.device import CPU
from deepfuse.ops.append_latent_fp8 import packed_rows, row_bytes
from deepfuse.ops.gather_latent import gather_latent
from deepfuse.ops.gather_latent_fp8 import gather_latent_fp8
from deepfuse.ops.head_matmul import head_matmul
from deepfuse.ops.linear import linear
from deepfuse.ops.mla_attention import mla_attention
from deepfuse.ops.mla_decode import mla_decode
from deepfuse.passes.absorb_mla import _decode_site, _predict, absorb_mla
from deepfuse.passes.journal import noting
from deepfuse.passes.runner import op_counts
from graphs import trace

B, H, C, N, R, V, PAGES = 2, 3, 16, 8, 4, 12, 2
SCALE = (N + R) ** -0.5
SETTINGS = {"device": CPU, "max_seq_len": 4096}


def attend(q, weight, latent, k_rope, k_start, seqlens, *, bias=None, queries=1):
    """Attention of ``queries`` of each sequence, over a latent that is expanded first: the result and its statistics."""
    kv = linear(latent, weight, bias).unflatten(-1, (H, N + V))
    q_start = torch.arange(0, q.shape[0] + 1, queries, dtype=torch.int32)
    return mla_attention(q, kv, k_rope, q_start, k_start, seqlens, SCALE)


def expanded(q, weight, cache, block_table, seqlens):
    rows, k_start = gather_latent(cache, block_table)
    return attend(q, weight, *rows.split((C, R), -1), k_start, seqlens)[0]


def expanded_fp8(q, weight, cache, block_table, seqlens):
    rows, k_start = gather_latent_fp8(cache, block_table, C, q.dtype)
    return attend(q, weight, *rows.split((C, R), -1), k_start, seqlens)[0]


def absorbed(q, weight, cache, block_table, seqlens):
    w_uk, w_uv = weight.view(H, N + V, C).split((N, V), 1)
    mixed = mla_decode(head_matmul(q[..., :N], w_uk), q[..., N:], cache, block_table, seqlens, SCALE)
    return head_matmul(mixed, w_uv.transpose(1, 2))


def arguments():
    pages = torch.arange(1, B * PAGES + 1).reshape(B, PAGES)
    return (
        torch.randn(B, H, N + R),
        torch.randn(H * (N + V), C) / C**0.5,
        torch.randn(B * PAGES + 1, 64, C + R),
        pages,
        torch.tensor([70, 5], dtype=torch.int32),
    )


def rewritten(fn, *args, **settings):
    gm = trace(fn, *args)
    notes = []
    with noting(notes):
        count = absorb_mla(gm.graph, **{**SETTINGS, **settings})
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    return gm, count, notes


def test_decode_is_absorbed():
    args = arguments()
    gm, count, notes = rewritten(expanded, *args)
    assert count == 1
    assert "absorbed" in notes[0] and "predicted" in notes[0]
    counts = op_counts(gm.graph)
    assert counts["deepfuse.mla_decode.default"] == 1 and counts["deepfuse.head_matmul.default"] == 2
    for gone in ("mla_attention", "gather_latent", "linear"):
        assert f"deepfuse.{gone}.default" not in counts
    # reassociating: sums of C = 16 and N = 8 terms in another order, a few units of roundoff of values near one
    torch.testing.assert_close(gm(*args), expanded(*args), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gm(*args), absorbed(*args), atol=0, rtol=0)


def test_decode_over_a_cache_in_fp8_is_absorbed():
    q, weight, cache, *rest = arguments()
    cache = packed_rows(cache[..., :C].flatten(0, 1), cache[..., C:].flatten(0, 1)).unflatten(0, cache.shape[:2])
    gm, count, notes = rewritten(expanded_fp8, q, weight, cache, *rest)
    assert count == 1 and "absorbed; predicted" in notes[0]
    counts = op_counts(gm.graph)
    assert counts["deepfuse.mla_decode_fp8.default"] == 1 and "deepfuse.gather_latent_fp8.default" not in counts
    # as above: both read the same rounded rows
    torch.testing.assert_close(gm(q, weight, cache, *rest), expanded_fp8(q, weight, cache, *rest), atol=1e-5, rtol=1e-5)


def test_prediction_counts_the_bytes_of_the_cache():
    q, weight, cache, *rest = arguments()
    in_fp8 = torch.zeros(*cache.shape[:2], row_bytes(C, R), dtype=torch.uint8)
    predicted = []
    for fn, given in ((expanded, cache), (expanded_fp8, in_fp8)):
        gm = trace(fn, q, weight, given, *rest)
        (attention,) = gm.graph.find_nodes(op="call_function", target=mla_attention.overload)
        predicted.append(_predict(attention, _decode_site(attention), CPU, 4096))
    # 16 + 4 + 2 * 4 bytes a token instead of 20 * 4
    assert predicted[1][1] < predicted[0][1] and predicted[1][0] < predicted[0][0]


def test_is_idempotent():
    gm, _, _ = rewritten(expanded, *arguments())
    assert absorb_mla(gm.graph, **SETTINGS) == 0


def test_every_new_node_knows_its_value():
    gm, _, _ = rewritten(expanded, *arguments())
    assert all("val" in n.meta for n in gm.graph.nodes if n.op == "call_function")


def test_the_cheaper_form_is_taken(monkeypatch):
    monkeypatch.setattr("deepfuse.passes.absorb_mla._predict", lambda *args: (1.0, 2.0))
    gm, count, notes = rewritten(expanded, *arguments())
    assert count == 0 and "left expanded; absorbed predicted 2.0 us, or 1.0 us expanded" in notes[0]
    assert op_counts(gm.graph)["deepfuse.mla_attention.default"] == 1


def test_leaves_a_prefill_alone():
    def prefill(q, kv, k_rope, q_start, k_len):
        return mla_attention(q, kv, k_rope, q_start, q_start[:-1], k_len, SCALE)[0]

    args = (
        torch.randn(5, H, N + R),
        torch.randn(5, H, N + V),
        torch.randn(5, R),
        torch.tensor([0, 2, 5], dtype=torch.int32),
        torch.tensor([2, 3], dtype=torch.int32),
    )
    _, count, notes = rewritten(prefill, *args)
    assert count == 0 and "do not come straight from a linear layer" in notes[0]


def test_leaves_several_queries_a_sequence_alone():
    def pairs(q, weight, cache, block_table, seqlens):
        rows, k_start = gather_latent(cache, block_table)
        return attend(q, weight, *rows.split((C, R), -1), k_start, seqlens, queries=2)[0]

    q, *rest = arguments()
    _, count, notes = rewritten(pairs, torch.cat((q, q)), *rest)
    assert count == 0 and "several queries" in notes[0]


def test_leaves_it_alone_where_the_statistics_are_read():
    def with_lse(q, weight, cache, block_table, seqlens):
        rows, k_start = gather_latent(cache, block_table)
        return attend(q, weight, *rows.split((C, R), -1), k_start, seqlens)

    _, count, notes = rewritten(with_lse, *arguments())
    assert count == 0 and "statistics" in notes[0]


def test_leaves_swapped_parts_of_the_row_alone():
    def swapped(q, weight, cache, block_table, seqlens):
        rows, k_start = gather_latent(cache, block_table)
        k_rope, latent = rows.split((R, C), -1)
        return attend(q, weight, latent, k_rope, k_start, seqlens)[0]

    _, count, notes = rewritten(swapped, *arguments())
    assert count == 0 and "not the two parts" in notes[0]


def test_leaves_keys_that_begin_elsewhere_alone():
    def shifted(q, weight, cache, block_table, seqlens):
        rows, k_start = gather_latent(cache, block_table)
        return attend(q, weight, *rows.split((C, R), -1), k_start + 1, seqlens)[0]

    _, count, notes = rewritten(shifted, *arguments())
    assert count == 0 and "not from the cache" in notes[0]


def test_leaves_a_linear_layer_with_bias_alone():
    def biased(q, weight, cache, block_table, seqlens, bias):
        rows, k_start = gather_latent(cache, block_table)
        return attend(q, weight, *rows.split((C, R), -1), k_start, seqlens, bias=bias)[0]

    _, count, _ = rewritten(biased, *arguments(), torch.randn(H * (N + V)))
    assert count == 0


@pytest.mark.parametrize("tokens", [64, 4096])
def test_prediction_grows_with_the_context(tokens):
    gm = trace(expanded, *arguments())
    (attention,) = gm.graph.find_nodes(op="call_function", target=mla_attention.overload)
    site = _decode_site(attention)
    expand, absorb = _predict(attention, site, CPU, tokens)
    twice = _predict(attention, site, CPU, 2 * tokens)
    assert twice[0] > expand and twice[1] > absorb


@pytest.mark.parametrize("width", [N, N - 1])
def test_queries_are_taken_from_before_they_were_put_together(width):
    q, *rest = arguments()

    def before(q_nope, q_rope, *args):
        return expanded(torch.cat((q_nope, q_rope), -1), *args)

    given = (q[..., :width].clone(), q[..., width:].clone(), *rest)
    gm, count, _ = rewritten(before, *given)
    assert count == 1
    # of other widths they have to be put together
    assert bool(gm.graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)) == (width != N)
    torch.testing.assert_close(gm(*given), before(*given))

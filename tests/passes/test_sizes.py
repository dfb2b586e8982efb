"""One graph, captured with free sizes, serves all of them: 0 and 1, which specialise elsewhere, as well."""

import pytest
import torch

from deepfuse.blocks.batch import Batch
from deepfuse.blocks.decoder import DecoderLayer
from deepfuse.blocks.rotary import Rotary
from deepfuse.ir.device import CPU
from deepfuse.ir.private import mark_unbacked
from deepfuse.ops.gather_latent import gather_latent
from deepfuse.ops.linear import linear
from deepfuse.ops.mla_attention import mla_attention
from deepfuse.passes.pipeline import default
from deepfuse.passes.runner import Runner
from tiny_checkpoint import TINY

SIZES = (0, 1, 2, 7, 64, 65)


def runner():
    return Runner(default(), {"providers": {}, "device": CPU, "max_seq_len": 4096})


def compiled(fn, runner):
    return torch.compile(fn, fullgraph=True, dynamic=False, backend=runner.backend())


@pytest.mark.parametrize("layer", [0, 1], ids=["dense", "sparse"])
@torch.no_grad()
def test_a_layer_over_any_number_of_tokens(layer):
    block, rotary = DecoderLayer(TINY, layer), Rotary(TINY)
    for parameter in block.parameters():
        parameter.normal_(std=0.3)

    # one tensor, since free sizes of two are not known to be equal
    def fn(rows, q_start):
        delta, h, positions = rows.split((TINY.hidden_size, TINY.hidden_size, 1), -1)
        positions = positions[:, 0].long()
        return block(delta, h, Batch(positions, q_start, *rotary(positions)))

    def arguments(tokens, sequences):
        starts = torch.tensor([tokens * i // sequences for i in range(sequences + 1)], dtype=torch.int32)
        positions = torch.cat([torch.arange(n) for n in starts.diff().tolist()])
        return torch.cat((torch.randn(tokens, 2 * TINY.hidden_size), positions[:, None]), -1), starts

    log = runner()
    graph = compiled(fn, log)
    for tokens in (5, *SIZES):
        for sequences in (1, 3):
            args = arguments(tokens, sequences)
            for tensor in args:
                mark_unbacked(tensor, 0)
            for actual, expected in zip(graph(*args), fn(*args), strict=True):
                # the same sums in another order, some tens of terms near one
                torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5)
    assert len(log.journal.graphs) == 1


@torch.no_grad()
def test_absorbed_decode_over_any_number_of_pages():
    H, C, N, R, V, B = 3, 16, 8, 4, 12, 2
    weight, cache = torch.randn(H * (N + V), C) / 4, torch.randn(9, 64, C + R)

    def fn(q, block_table, seqlens):
        rows, k_start = gather_latent(cache, block_table)
        latent, k_rope = rows.split((C, R), -1)
        kv = linear(latent, weight, None).unflatten(-1, (H, N + V))
        q_start = torch.arange(q.shape[0] + 1, dtype=torch.int32)
        return mla_attention(q, kv, k_rope, q_start, k_start, seqlens, 0.3)[0]

    log = runner()
    graph = compiled(fn, log)
    for pages in (2, 1, 4):
        q, block_table = torch.randn(B, H, N + R), torch.randperm(8)[: B * pages].reshape(B, pages) + 1
        seqlens = torch.tensor([64 * pages, 5], dtype=torch.int32)
        mark_unbacked(block_table, 1)
        torch.testing.assert_close(graph(q, block_table, seqlens), fn(q, block_table, seqlens), atol=1e-5, rtol=1e-5)
    (entry,) = log.journal.graphs
    assert {p.name: p.rewrites for p in entry.passes}["absorb_mla"] == 1

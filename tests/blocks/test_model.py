from dataclasses import replace

import pytest
import torch

from deepfuse.blocks.decoder import FEED_FORWARD, DecoderLayer
from deepfuse.blocks.mlp import MLP
from deepfuse.blocks.model import CausalLM
from deepfuse.blocks.moe import MoE
from deepfuse.blocks.norm import RMSNorm
from tiny_checkpoint import TINY, model_of

IDS = torch.arange(9) * 7 % TINY.vocab_size
POSITIONS = torch.tensor([0, 1, 2, 3, 4, 5, 0, 1, 2])
STARTS = torch.tensor([0, 6, 9], dtype=torch.int32)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return model_of(TINY)


def test_rows_are_those_of_all_logits(model):
    rows = torch.tensor([8, 0, 5])
    with torch.no_grad():
        torch.testing.assert_close(model(IDS, POSITIONS, STARTS, rows=rows), model(IDS, POSITIONS, STARTS)[rows])


def test_logits_are_float32_in_a_narrow_model():
    with torch.no_grad():
        logits = model_of(TINY, torch.bfloat16)(IDS, POSITIONS, STARTS)
    assert logits.dtype == torch.float32 and logits.shape == (9, TINY.vocab_size)


def test_a_token_sees_the_tokens_before_it_and_no_others(model):
    changed = IDS.clone()
    changed[3] += 1
    with torch.no_grad():
        # grouped otherwise by their experts, rows may be rounded otherwise
        moved = (model(IDS, POSITIONS, STARTS) - model(changed, POSITIONS, STARTS)).abs().amax(-1)
    different = moved > 1e-5
    assert different.tolist() == [False] * 3 + [True] * 3 + [False] * 3


def test_the_stream_is_what_the_head_reads(model):
    with torch.no_grad():
        h, delta, (batch,) = model.stream(IDS, POSITIONS, STARTS)
        assert torch.equal(model.logits(model.model.norm(h + delta)), model(IDS, POSITIONS, STARTS))
    assert batch.slots is None and batch.block_table is None


def test_what_is_written_to_the_cache_is_the_normed_latent_and_the_turned_key(model):
    caches = [torch.zeros(2, 64, TINY.cache_width) for _ in range(TINY.num_hidden_layers)]
    slots = torch.arange(9) + 64
    with torch.no_grad():
        with_cache = model(IDS, POSITIONS, STARTS, slots=slots, caches=caches)
        assert torch.equal(with_cache, model(IDS, POSITIONS, STARTS))
        attention = model.model.layers[0].self_attn
        x = model.model.layers[0].input_layernorm(model.model.embed_tokens(IDS))
        latent, key = attention.kv_a_proj_with_mqa(x).split((TINY.kv_lora_rank, TINY.qk_rope_head_dim), -1)
    for cache in caches:
        assert not cache[0].any() and not cache[1, 9:].any() and cache[1, :9].all()
    written = caches[0][1, :9]
    torch.testing.assert_close(written[:, : TINY.kv_lora_rank], attention.kv_a_layernorm(latent))
    first = POSITIONS == 0
    turned = written[:, TINY.kv_lora_rank :]
    # position 0 is not turned; turning keeps lengths
    torch.testing.assert_close(turned[first], key[first])
    torch.testing.assert_close(turned.norm(dim=-1), key.norm(dim=-1))
    assert not torch.allclose(turned[~first], key[~first])


def test_a_tied_head_is_the_embedding():
    model = CausalLM(replace(TINY, tie_word_embeddings=True))
    assert model.lm_head is None and "lm_head.weight" not in model.state_dict()
    x = torch.randn(2, TINY.hidden_size)
    model.initialize()
    torch.testing.assert_close(model.logits(x), x @ model.model.embed_tokens.weight.T)


def test_weights_are_drawn_as_the_report_says():
    config = replace(TINY, initializer_range=0.006, attention_bias=True, hidden_size=256)
    model = CausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    model.initialize(seed=3)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            # thousands of draws: the deviation of the deviation is 1 / sqrt(2 n)
            assert float(parameter.detach().std()) == pytest.approx(0.006, rel=5 / (2 * parameter.numel()) ** 0.5), name


def test_the_seed_decides_the_weights():
    first, same, other = CausalLM(TINY), CausalLM(TINY), CausalLM(TINY)
    for model, seed in ((first, 1), (same, 1), (other, 2)):
        model.initialize(seed)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), same.parameters(), strict=True))
    assert not torch.equal(first.model.embed_tokens.weight, other.model.embed_tokens.weight)


def test_kinds_of_feed_forward_blocks_follow_the_configuration(monkeypatch):
    with torch.device("meta"):
        kinds = [type(layer.mlp) for layer in CausalLM(TINY).model.layers]
        assert kinds == [MLP, MoE, MoE, MoE]
        mixed = replace(TINY, mlp_layer_types=("sparse", "dense", "sparse"))
        assert [type(layer.mlp) for layer in CausalLM(mixed).model.layers] == [MoE, MLP, MoE, MoE]
        monkeypatch.setitem(FEED_FORWARD, "norm", lambda config: RMSNorm(config.hidden_size, 1e-6))
        assert isinstance(DecoderLayer(replace(TINY, mlp_layer_types=("norm",) * 3), 1).mlp, RMSNorm)
        with pytest.raises(ValueError, match=r"want mlp_layer_types out of \['dense', 'sparse', 'norm'\], got 'moe'"):
            DecoderLayer(replace(TINY, mlp_layer_types=("moe",) * 3), 1)
